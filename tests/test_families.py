"""Targets with experts, sinks, windows and Gemma's norms under every drafter.

`EVERYTHING` has at once all that families have one by one; the goldens of each
family say what transformers would have answered.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.config import ConfigError, TargetSource
from dflash_jax.config_json import from_json
from dflash_jax.drafters import LanguageModel
from dflash_jax.engine import Engine, EngineConfig, Request
from dflash_jax.model import borrow
from dflash_jax.proposal import Drafting
from dflash_jax.sampling import GREEDY
from dflash_jax.session import Session
from dflash_jax.target import Target
from dflash_jax.target_network import Experts, Gate
from tests.drafters.baselines import (
  CHAIN,
  LAW,
  TREE,
  VOCAB,
  decoder_of,
  talk,
)
from tests.test_target import load_case
from tests.testing import random_params, tiny_model, tiny_target_config
from train.packing import read_packed

WINDOW = 4
DRAFTS = 3
EVERYTHING = tiny_target_config(
  VOCAB,
  num_layers=2,
  rotary_base=300.0,
  qkv_bias=True,
  qk_norm=True,
  output_bias=True,
  attention_sinks=True,
  layer_windows=(WINDOW, 0),
  local_rotary_base=20.0,
  score_scale=0.4,
  gate=Gate("clamped", limit=1.5),
  experts=Experts(count=5, top_k=2, width=14, bias=True, dense_layers=(1,)),
  unit_offset=True,
  post_norms=True,
  embedding_scale=3.0,
)


def disturb(params, seed):
  """Every number moved: biases, sinks and norms off their first values."""

  def move(x):
    noise = jax.random.normal(jax.random.key(seed + x.size), x.shape)
    return x + 0.3 * noise if x.ndim == 1 else x * (1 + 0.03 * noise)

  return jax.tree.map(move, params)


@functools.cache
def model_of(case: str, kind: str, **decode):
  """A target with a random DFlash drafter, or a blurred copy of itself.

  Args:
    case: a golden's, or "everything".
    kind: "dflash" or "near", of the drafter; "none".
  """
  if case == "everything":
    config = EVERYTHING
    params = disturb(random_params(Target(config), 0), 7)
  else:
    target, params, _ = load_case(case)
    config = target.config
  model = tiny_model(
    drafter=kind == "dflash",
    target=config,
    **decode,
  )
  everything = dataclasses.replace(
    model.params, target=params, borrowed=borrow(params, None)
  )
  model = dataclasses.replace(model, params=everything)
  if kind != "near":
    return model
  blurred = jax.tree.map(
    lambda x: (
      x * (1 + 0.02 * jax.random.normal(jax.random.key(x.size), x.shape))
    ),
    params,
  )
  return dataclasses.replace(
    model,
    drafter=LanguageModel(config, DRAFTS),
    params=dataclasses.replace(everything, drafter=blurred),
  )


@functools.cache
def plain_replies(law):
  plain = model_of("everything", "none")
  return talk(plain, plain.decoder(law))


SLOW = {"marks": pytest.mark.slow}


@pytest.mark.parametrize(
  ("kind", "drafting", "law"),
  [
    pytest.param("near", TREE, LAW, id="near sampled tree"),
    pytest.param("dflash", CHAIN, GREEDY, id="dflash greedy chain"),
    pytest.param("near", TREE, GREEDY, id="near greedy tree", **SLOW),
    pytest.param("near", CHAIN, LAW, id="near sampled chain", **SLOW),
    pytest.param("near", CHAIN, GREEDY, id="near greedy chain", **SLOW),
    pytest.param("dflash", TREE, LAW, id="dflash sampled tree", **SLOW),
    pytest.param("dflash", TREE, GREEDY, id="dflash greedy tree", **SLOW),
    pytest.param("dflash", CHAIN, LAW, id="dflash sampled chain", **SLOW),
  ],
)
def test_replies_are_those_of_plain_decoding(kind, drafting, law):
  """Three rows at their own pace, over two turns, past every window."""
  if law is not GREEDY:
    drafting = dataclasses.replace(drafting, is_coupled=True)
  model = model_of("everything", kind)
  decoder = decoder_of(model, drafting, law)
  assert talk(model, decoder) == plain_replies(law)


@pytest.mark.parametrize("kind", ["near", pytest.param("dflash", **SLOW)])
@pytest.mark.parametrize(
  "case",
  [
    "gpt_oss",
    pytest.param("qwen3_moe", **SLOW),
    pytest.param("gemma3", **SLOW),
  ],
)
def test_drafted_replies_are_those_of_transformers(case, kind):
  """A tree of drafts; those of a model close to the target are often right."""
  model = model_of(case, kind)
  _, _, golden = load_case(case)
  budget = golden["greedy"].shape[1]
  decoder = decoder_of(model, Drafting(7, is_tree=True))
  session = Session(model, decoder, 2, 13 + budget + 8, budget)
  replies = session.reply(golden["tokens"].tolist(), [budget] * 2)
  for reply, expected in zip(replies, golden["greedy"].tolist(), strict=True):
    stop = model.target.config.eos_ids[0]
    end = expected.index(stop) + 1 if stop in expected else budget
    assert reply.tokens == expected[:end]
    assert reply.tau > (1.5 if kind == "near" else 0.99)


@pytest.mark.parametrize(
  "law", [LAW, pytest.param(GREEDY, **SLOW)], ids=["sampled", "greedy"]
)
def test_requests_that_share_a_prefix_get_what_they_get_alone(law):
  """Pages and a trunk, both longer than the window."""
  model = model_of(
    "everything",
    "near",
    prefill_chunk=8,
    rounds_per_dispatch=1,
    width=f"fixed:{DRAFTS}",
  )
  common = np.random.default_rng(0).integers(0, VOCAB, 21).tolist()
  requests = [
    Request([*common, i, 7], max_new_tokens=11, sampling=law, seed=i)
    for i in range(4)
  ]
  settings = EngineConfig(
    sizes=(2,), capacity=48, max_new_tokens=12, page=2, trunk=32
  )
  engine = Engine(model, settings)
  lane, members = engine.lanes[""], [0]
  handles = [engine.submit(request) for request in requests]
  while engine.step():
    cache = lane._batch and lane._batch.cache
    if cache is not None and cache.trunk is not None:
      members.append(int(cache.member.sum()))
  assert max(members) == 2, "a trunk was shared"
  found = [handle.result(0) for handle in handles]
  assert sum(result.hit_tokens for result in found) == 3 * 20
  plain = model_of("everything", "none")
  for request, result in zip(requests, found, strict=True):
    session = Session(plain, plain.decoder(law), 1, 48, 12)
    (alone,) = session.reply([request.prompt], [11], seeds=[request.seed])
    assert result.tokens == alone.tokens


def test_a_target_as_its_own_drafter_is_always_right():
  """Its windows and sinks are the same, token by token."""
  model = model_of("everything", "near")
  params = dataclasses.replace(model.params, drafter=model.params.target)
  model = dataclasses.replace(model, params=params)
  budget = 1 + 5 * (DRAFTS + 1)
  session = Session(model, decoder_of(model, Drafting(DRAFTS)), 1, 40, budget)
  reply = session.reply([[5, 1, 8]], [budget])[0]
  assert reply.tau == DRAFTS + 1


def test_a_window_shorter_than_the_drafts_is_refused():
  drafter = LanguageModel(EVERYTHING, WINDOW + 1)
  with pytest.raises(ConfigError, match="window of 4 tokens.*5 drafts"):
    drafter.check_target(EVERYTHING)
  LanguageModel(EVERYTHING, WINDOW).check_target(EVERYTHING)


def test_documents_in_one_row_are_read_as_if_alone():
  """As training reads them."""
  model = model_of("everything", "none")
  target, params, taps = model.target, model.params.target, (0, 1)
  text = np.random.default_rng(1).integers(0, VOCAB, (1, 17))
  starts = np.where(np.arange(17) < 7, 0, 7)[None]
  packed = jax.jit(read_packed, static_argnums=(0, 4))(
    target, params, jnp.asarray(text), jnp.asarray(starts), taps
  )
  forward = jax.jit(Target.forward, static_argnums=(0, 4))
  for piece in (slice(0, 7), slice(7, 17)):
    cache = target.init_cache(1, 20)
    _, alone, _ = forward(
      target, params, jnp.asarray(text[:, piece]), cache, taps
    )
    np.testing.assert_allclose(packed[:, piece], alone, 1e-4, 1e-4)


def test_a_drafter_borrows_the_embedding_as_it_is_stored():
  """Gemma's scale belongs to the target's own way in."""
  _, params, _ = load_case("gemma3")
  borrowed = borrow(params, None)
  np.testing.assert_array_equal(borrowed.embedding, params["embedding"])


def test_a_networks_record_is_read_back():
  source = TargetSource(random=EVERYTHING)
  text = json.dumps(dataclasses.asdict(source))
  assert from_json(TargetSource, text, "a record") == source
