"""The target against transformers, from golden files."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dflash_jax import weights
from dflash_jax.decode import Decoder, ModelParams
from dflash_jax.drafters import NoDrafter
from dflash_jax.model import borrow
from dflash_jax.target import Target

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "targets"
CASES = sorted(path.name for path in GOLDENS.iterdir())
TOLERANCE = 2e-4  # issue's bound for float32 against another framework


@pytest.fixture(params=CASES)
def case(request):
  """A golden model: target, parameters, truth."""
  directory = GOLDENS / request.param
  config, params = weights.load_target(str(directory), "float32")
  return Target(config), params, load_file(directory / "golden.safetensors")


def read(target, params, tokens, pieces):
  """Feeds tokens in pieces of the given lengths, committing each."""
  taps = tuple(range(target.config.num_layers))
  cache = target.init_cache(tokens.shape[0], 31)
  hidden, states, first = [], [], 0
  for length in pieces:
    piece = jnp.asarray(tokens[:, first : first + length])
    h, s, cache = target.forward(params, piece, cache, taps)
    cache = cache.commit(jnp.full((tokens.shape[0],), length))
    hidden.append(h)
    states.append(s)
    first += length
  hidden = jnp.concatenate(hidden, axis=1)
  return target.logits(params, hidden), jnp.concatenate(states, axis=1)


def tapped(states, target):
  """f32[B, T, L * D] -> f32[L, B, T, D]."""
  B, T, _ = states.shape
  states = np.asarray(states).reshape(B, T, target.config.num_layers, -1)
  return states.transpose(2, 0, 1, 3)


def test_logits_and_every_layer_match_transformers(case):
  target, params, golden = case
  T = golden["tokens"].shape[1]
  logits, states = read(target, params, golden["tokens"], [T])
  np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE)
  np.testing.assert_allclose(
    tapped(states, target), golden["hidden_states"], atol=TOLERANCE
  )


def test_reading_in_pieces_changes_nothing(case):
  target, params, golden = case
  T = golden["tokens"].shape[1]
  logits, _ = read(target, params, golden["tokens"], [5, 1, T - 6])
  np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE)


def test_greedy_continuation_matches_transformers(case):
  target, params, golden = case
  B, T = golden["tokens"].shape
  _, M = golden["greedy"].shape
  decoder = Decoder(target, NoDrafter(), num_drafts=0, early_exit=True)
  state = decoder.init_state(B, T + M + decoder.slack(T), M)
  state = decoder.begin(state, np.full(B, M), np.zeros(B))
  model = ModelParams(params, {}, borrow(params, None))
  every = np.ones(B, bool)
  state = decoder.prefill(model, state, golden["tokens"], np.full(B, T), every)
  while not bool(state.done.all()):
    state = decoder.run_rounds(model, state)
  np.testing.assert_array_equal(state.tokens[:, :M], golden["greedy"])


def test_rejected_rows_leave_no_trace(case):
  target, params, golden = case
  tokens = jnp.asarray(golden["tokens"])
  B, T = tokens.shape
  cache = target.init_cache(B, 31)
  _, _, cache = target.forward(params, tokens[:, :6], cache)
  cache = cache.commit(jnp.full((B,), 6))
  wrong = (tokens[:, 6:10] + 1) % target.config.vocab_size
  _, _, cache = target.forward(params, wrong, cache)
  cache = cache.commit(jnp.zeros((B,), jnp.int32))
  hidden, _, _ = target.forward(params, tokens[:, 6:], cache)
  np.testing.assert_allclose(
    target.logits(params, hidden), golden["logits"][:, 6:], atol=TOLERANCE
  )


def test_rows_of_unequal_length_do_not_mix(case):
  target, params, golden = case
  tokens = jnp.asarray(golden["tokens"])
  B, T = tokens.shape
  cache = target.init_cache(B, 31)
  lengths = jnp.array([3, 7])
  _, _, cache = target.forward(params, tokens[:, :7], cache)
  cache = cache.commit(lengths)
  rows = jnp.stack([tokens[0, 3:8], tokens[1, 7:12]])
  hidden, _, _ = target.forward(params, rows, cache)
  logits = target.logits(params, hidden)
  np.testing.assert_allclose(
    logits[0], golden["logits"][0, 3:8], atol=TOLERANCE
  )
  np.testing.assert_allclose(
    logits[1], golden["logits"][1, 7:12], atol=TOLERANCE
  )


def test_random_parameters_have_the_shapes_of_loaded_ones(case):
  target, params, _ = case
  drawn = jax.eval_shape(target.init, jax.random.key(0))
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert jax.tree.map(lambda x: x.shape, drawn) == shapes
