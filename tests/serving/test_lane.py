"""A prefix that was kept brings the drafter's context along, for each kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.drafters import DFlash, Eagle3, LanguageModel, NGram
from dflash_jax.engine import Engine, EngineConfig, Request
from dflash_jax.networks import Eagle3Config
from dflash_jax.proposal import Moment
from tests.testing import random_params, tiny_drafter_config, tiny_model

VOCAB = 31
PAGE = 4


def drafter_of(kind, target):
  """A random drafter, and its parameters."""
  if kind == "dflash":
    drafter = DFlash(tiny_drafter_config(target))
  elif kind == "lm":
    drafter = LanguageModel(dataclasses.replace(target, num_layers=2), 3)
  elif kind == "ngram":
    return NGram(3), {}
  else:
    config = Eagle3Config(
      width=22,
      mlp_width=34,
      num_heads=6,
      num_kv_heads=2,
      head_width=10,
      vocab_size=VOCAB,
      draft_vocab_size=VOCAB,
      target_layer_ids=(0, 1, 2),
      target_width=target.width,
      own_embedding=True,
    )
    drafter = Eagle3(config, 3)
  params = random_params(drafter, 5)
  return drafter, {k: v for k, v in params.items() if k != "head_ids"}


def lane_of(kind):
  model = tiny_model(VOCAB, drafter=False, prefill_chunk=16, width="fixed:3")
  drafter, params = drafter_of(kind, model.target.config)
  params = dataclasses.replace(model.params, drafter=params)
  model = dataclasses.replace(model, drafter=drafter, params=params)
  config = EngineConfig(
    sizes=(1,), capacity=96, max_new_tokens=8, page=PAGE, prefix_bytes=2**20
  )
  engine = Engine(model, config)
  return engine, engine.lanes[""]


def read(engine, lane, prompt, **options):
  """A prompt at the desk, read to its end; tokens not read."""
  engine.submit(Request(prompt, max_new_tokens=8, **options))
  lane.begin(engine._pop(lane))
  hit = lane.reading.hit
  while lane.reading.read < len(prompt):
    lane.read()
  return hit


def proposal_at_desk(lane):
  state, params = lane._desk, lane.model.params
  propose = jax.jit(lane.decoder.drafter.propose, static_argnums=4)
  return propose(
    params.drafter,
    state.drafter,
    state.anchor,
    params.borrowed,
    lane.decoder.drafting,
    Moment(state.seeds, state.cache.length),
    state.budget - state.count,
  )


# 61 tokens fill 15 pages, more than a call moves; the last one is apart.
@pytest.mark.parametrize(
  ("kind", "length"),
  [
    ("dflash", 61),
    ("eagle3", 61),
    ("eagle3", 60),
    ("eagle3", 9),
    ("lm", 60),
    ("ngram", 61),
  ],
)
def test_drafts_after_a_hit_are_those_of_a_prompt_read_whole(kind, length):
  engine, lane = lane_of(kind)
  rng = np.random.default_rng(7)
  prompt = np.tile(rng.integers(0, VOCAB, 10), 7)[:length].tolist()
  assert read(engine, lane, prompt) == 0
  whole, anchor = proposal_at_desk(lane), int(lane._desk.anchor[0])
  lane.drop_reading()
  # Another text between, which leaves its own rows at the desk.
  read(engine, lane, rng.integers(0, VOCAB, 70).tolist())
  lane.drop_reading()
  rereads = lane.decoder.drafter.rereads
  hit = read(engine, lane, prompt)
  assert hit == min(length // PAGE * PAGE - rereads, length - 1)
  assert int(lane._desk.anchor[0]) == anchor
  np.testing.assert_array_equal(lane._desk.cache.length, [length])
  found = proposal_at_desk(lane)
  np.testing.assert_array_equal(found.tokens, whole.tokens)
  np.testing.assert_allclose(found.confidence, whole.confidence, atol=1e-5)
  assert jnp.isfinite(found.margins).all() or kind == "ngram"


def test_a_continuation_of_a_fork_finds_the_fork_alone():
  """Two texts that part inside a page share the pages before it."""
  engine, lane = lane_of("eagle3")
  stem = list(range(14))
  hits = []
  for branch in ([20, 21, 22, 23, 24], [25, 21, 22, 23, 24]):
    hits.append(read(engine, lane, stem + branch))
    lane.drop_reading()
  assert hits == [0, 12 - 1]
  assert read(engine, lane, [*stem, 25, 21, 22, 23, 24, 5]) == 16 - 1
  whole = proposal_at_desk(lane)
  lane.drop_reading()
  read(engine, lane, [*stem, 25, 21, 22, 23, 24, 5], shares_prefix=False)
  np.testing.assert_allclose(
    whole.confidence, proposal_at_desk(lane).confidence, atol=1e-5
  )


def test_memory_is_what_was_computed_before():
  engine, lane = lane_of("dflash")
  planned = lane.row_bytes(1) + lane.shelf.most_bytes
  assert not lane.bytes_held
  read(engine, lane, list(range(20)))
  assert lane.bytes_held == planned
  lane.leave_desk([])
  lane.dispatch()
  lane.collect()
  assert lane.bytes_held == planned + lane.row_bytes(1)
  assert lane.most_bytes(1) == lane.bytes_held == lane.peak_bytes
  arrays = [*jax.tree.leaves(lane.shelf._store), *jax.tree.leaves(lane._desk)]
  assert sum(x.nbytes for x in arrays) == planned
