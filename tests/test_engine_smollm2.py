"""The engine on the default target and its drafter; minutes, so slow."""

import dataclasses
import random

import numpy as np
import pytest

from configs import smollm2_135m
from dflash_jax import load
from dflash_jax.engine import Engine, EngineConfig, Request
from dflash_jax.prompts import read_prompts
from dflash_jax.sampling import GREEDY, Sampling
from tests.serving.schedules import answer_alone, check_empty, lanes, run

CONFIG = EngineConfig(
  sizes=(4,), capacity=640, max_new_tokens=96, prefix_bytes=2**27
)
LAWS = [GREEDY, GREEDY, Sampling(0.7, top_p=0.95), Sampling(1.0, top_k=50)]
AGENTS = 16


@pytest.fixture(scope="module")
def model():
  """SmolLM2-135M-Instruct in float32, with the shipped drafter."""
  return load(smollm2_135m.get_config())


def texts(count):
  prompts = read_prompts("eval/prompts/mixed.jsonl", count)
  return [prompt.turns[0] for prompt in prompts]


def conversations(model, rng, count):
  """Requests of which many begin with the same system prompt."""
  system = " ".join(texts(12))[:1200]
  encode = model.tokenizer.encode_chat
  requests = []
  for text in texts(count):
    turns = [{"role": "user", "content": text}]
    if rng.random() < 0.6:
      turns = [{"role": "system", "content": system}, *turns]
    requests.append(
      Request(
        encode(turns),
        max_new_tokens=rng.randrange(4, 97),
        sampling=rng.choice(LAWS),
        seed=rng.randrange(2**32),
        lane="near",
        priority=rng.randrange(2),
      )
    )
  return requests


@pytest.mark.slow
def test_fifty_requests_do_not_notice_each_other(model):
  rng = random.Random(5)
  requests = conversations(model, rng, 50)
  engine = Engine(lanes(model), CONFIG)
  results = run(engine, rng, requests)
  quiet = Engine(lanes(model), CONFIG)
  for request, found in zip(requests, results, strict=True):
    plain = answer_alone(quiet, request, "none")
    count = len(found.tokens)
    if found.finish != "cancelled":
      assert found.finish == plain.finish
      count = len(plain.tokens)
    assert found.tokens == plain.tokens[:count]
  assert engine.counters.hit_rate > 0.2
  check_empty(engine)


@pytest.mark.slow
def test_sixteen_agents_read_a_common_prompt_once(model):
  """A prompt of 1,500 tokens: tokens, acceptance and the second's first token.

  A small run before compiles everything that is timed.
  """
  vocab = model.tokenizer.encode(" ".join(texts(120)))
  common, own = vocab[:1500], [vocab[1500 + 8 * i :][:8] for i in range(AGENTS)]
  assert len(own[-1]) == 8
  config = dataclasses.replace(
    CONFIG, sizes=(1, AGENTS), capacity=1600, max_new_tokens=32
  )

  def answers(shares):
    engine = Engine(model, config)
    handles = [
      engine.submit(Request(common + tail, 32, shares_prefix=shares))
      for tail in own
    ]
    engine.run()
    return engine, [handle.result(0) for handle in handles]

  def first_tokens():
    """Seconds to the first token of two agents, one after the other."""
    engine = Engine(model, config)
    times = []
    for tail in own[:2]:
      handle = engine.submit(Request(common + tail, 32))
      engine.run()
      times.append(handle.result(0).ttft_s)
    engine.close()
    return times

  engine, shared = answers(True)
  assert engine.counters.read_tokens == 1508 + (AGENTS - 1) * (1508 - 1472)
  apart = answers(False)[1]
  assert [r.tokens for r in shared] == [r.tokens for r in apart]
  assert [r.accepted for r in shared] == [r.accepted for r in apart]
  assert np.mean([r.tau for r in shared]) > 1.2
  first_tokens()
  first, second = first_tokens()
  assert second <= 0.15 * first, (first, second)
  check_empty(engine)
