"""The default target, real weights: forward, greedy text, losslessness."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import smollm2_135m
from dflash_jax import generate, load
from dflash_jax.model import Model
from dflash_jax.prompts import read_prompts
from dflash_jax.session import Session

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "smollm2"
PROMPTS = json.loads((GOLDENS / "prompts.json").read_text())


@pytest.fixture(scope="module")
def model() -> Model:
  """SmolLM2-135M-Instruct in float32, with the shipped drafter."""
  return load(smollm2_135m.get_config())


@pytest.fixture(scope="module")
def plain(model) -> Model:
  """The same target without a drafter."""
  return model.without_drafter()


@pytest.mark.parametrize("name", ["chat", "plain"])
def test_logits_and_taps_match_transformers(plain, name):
  golden = load_file(GOLDENS / "forward.safetensors")
  golden = {
    key.removeprefix(f"{name}."): value
    for key, value in golden.items()
    if key.startswith(name)
  }
  tokens = jnp.asarray(golden["tokens"])[None]
  layers = tuple(golden["tap_layers"].tolist())
  cache = plain.target.init_cache(1, tokens.size)
  hidden, taps, _ = plain.target.forward(
    plain.params.target, tokens, cache, layers
  )
  logits = plain.target.logits(plain.params.target, hidden)
  np.testing.assert_allclose(
    logits[0, golden["logit_positions"]], golden["logits"], atol=2e-4
  )
  taps = np.split(np.asarray(taps[0, golden["tap_positions"]]), len(layers), 1)
  # The first token's states reach 25,000: float32 keeps 7 digits of them.
  np.testing.assert_allclose(taps, golden["taps"], atol=2e-4, rtol=2e-5)


def decode(
  model: Model, prompts: list[list[int]], rows: int
) -> list[list[int]]:
  """Replies of 100 tokens to tokenised prompts."""
  replies = []
  for first in range(0, len(prompts), rows):
    session = Session(
      model=model,
      decoder=model.decoder(),
      batch=rows,
      capacity=356,
      max_new_tokens=100,
    )
    part = prompts[first : first + rows]
    replies += [r.tokens for r in session.reply(part, [100] * len(part))]
  return replies


def test_greedy_text_matches_transformers_on_every_golden_prompt(plain):
  assert len(PROMPTS) >= 20
  replies = decode(plain, [p["prompt_tokens"] for p in PROMPTS], rows=4)
  assert replies == [p["greedy_tokens"] for p in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_speculative_tokens_are_plain_decodings(model, plain, batch_size):
  texts = [p["messages"][-1]["content"] for p in PROMPTS if "messages" in p]
  texts = (texts + [p["prompt"] for p in PROMPTS if "prompt" in p])[:20]
  assert len(texts) == 20
  settings = {"max_new_tokens": 128, "batch_size": batch_size}
  speculative = generate(model, texts, **settings)
  expected = generate(plain, texts, **settings)
  assert [c.tokens for c in speculative] == [c.tokens for c in expected]
  tau = sum(len(c.tokens) - 1 for c in speculative) / sum(
    c.rounds for c in speculative
  )
  assert tau > 1.5, f"the drafter barely helps: tau {tau:.2f}"


def test_a_narrower_or_wider_verify_width_changes_no_token(model, plain):
  prompt = PROMPTS[0]["prompt_tokens"]
  expected = decode(plain, [prompt], rows=1)
  for width in (1, 7):
    config = dataclasses.replace(
      model.config,
      decode=dataclasses.replace(model.config.decode, width=f"fixed:{width}"),
    )
    assert decode(dataclasses.replace(model, config=config), [prompt], 1) == (
      expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_speculative_tokens_are_plain_decodings_on_many_prompts(
  model, plain, batch_size
):
  texts = [p.turns[0] for p in read_prompts("eval/prompts/chat.jsonl")]
  settings = {"max_new_tokens": 128, "batch_size": batch_size}
  speculative = generate(model, texts, **settings)
  expected = generate(plain, texts, **settings)
  differing = [
    text
    for text, ours, theirs in zip(texts, speculative, expected, strict=True)
    if ours.tokens != theirs.tokens
  ]
  assert not differing
