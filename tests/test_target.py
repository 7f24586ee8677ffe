"""The target against transformers, from golden files."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dflash_jax import weights
from dflash_jax.cache import Trunk
from dflash_jax.decode import Decoder
from dflash_jax.decode_state import ModelParams
from dflash_jax.drafters import NoDrafter
from dflash_jax.model import borrow
from dflash_jax.proposal import Drafting
from dflash_jax.target import Target
from dflash_jax.tree import Tree

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "targets"
CASES = sorted(path.name for path in GOLDENS.iterdir())
# The cache knows no family, but sinks and windows know the cache.
CACHE_CASES = ["llama3", "qwen2", "qwen3_yarn", "gpt_oss", "gemma3"]
TOLERANCE = 2e-4  # issue's bound for float32 against another framework


forward = jax.jit(Target.forward, static_argnums=(0, 4))


@functools.cache
def load_case(name):
  """A golden model: target, parameters, truth."""
  directory = GOLDENS / name
  config, params = weights.load_target(str(directory), "float32")
  return Target(config), params, load_file(directory / "golden.safetensors")


@pytest.fixture(params=CASES)
def case(request):
  return load_case(request.param)


@pytest.fixture(params=CACHE_CASES)
def cache_case(request):
  return load_case(request.param)


def taps_of(target):
  return tuple(range(target.config.num_layers))


def read(target, params, tokens, pieces):
  """Feeds tokens in pieces of the given lengths, committing each."""
  taps = taps_of(target)
  cache = target.init_cache(tokens.shape[0], 31)
  hidden, states, first = [], [], 0
  for length in pieces:
    piece = jnp.asarray(tokens[:, first : first + length])
    h, s, rows = forward(target, params, piece, cache, taps)
    cache = cache.extend(rows, jnp.full((tokens.shape[0],), length))
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


def test_the_last_layers_output_becomes_the_logits(case):
  """As training rebuilds them, by the norm that the family has."""
  target, params, golden = case
  hidden = target.normalize(params, golden["hidden_states"][-1])
  logits = target.logits(params, hidden)
  np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE)


def test_reading_in_pieces_changes_nothing(cache_case):
  target, params, golden = cache_case
  logits, _ = read(target, params, golden["tokens"], [6, 1, 6])
  np.testing.assert_allclose(logits, golden["logits"], atol=TOLERANCE)


def test_greedy_continuation_matches_transformers(case):
  target, params, golden = case
  B, T = golden["tokens"].shape
  _, M = golden["greedy"].shape
  decoder = Decoder(target, NoDrafter(), Drafting(0), early_exit=True)
  state = decoder.init_state(B, T + M + decoder.slack(T), M)
  state = decoder.begin(state, np.full(B, M), np.zeros(B))
  model = ModelParams(params, {}, borrow(params, None))
  every = np.ones(B, bool)
  state = decoder.prefill(model, state, golden["tokens"], np.full(B, T), every)
  while not bool(state.done.all()):
    state = decoder.run_rounds(model, state)
  np.testing.assert_array_equal(state.tokens[:, :M], golden["greedy"])


def test_rejected_rows_leave_no_trace(cache_case):
  target, params, golden = cache_case
  tokens, taps = jnp.asarray(golden["tokens"]), taps_of(target)
  B, _ = tokens.shape
  cache = target.init_cache(B, 31)
  _, _, new = forward(target, params, tokens[:, :6], cache, taps)
  cache = cache.extend(new, jnp.full((B,), 6))
  wrong = (tokens[:, 6:12] + 1) % target.config.vocab_size
  _, _, new = forward(target, params, wrong, cache, taps)
  cache = cache.extend(new, jnp.zeros((B,), jnp.int32))
  hidden, _, _ = forward(target, params, tokens[:, 6:12], cache, taps)
  np.testing.assert_allclose(
    target.logits(params, hidden), golden["logits"][:, 6:12], atol=TOLERANCE
  )


def test_rows_of_unequal_length_do_not_mix(cache_case):
  target, params, golden = cache_case
  tokens, taps = jnp.asarray(golden["tokens"]), taps_of(target)
  cache = target.init_cache(2, 31)
  _, _, new = forward(target, params, tokens[:, :6], cache, taps)
  cache = cache.extend(new, jnp.array([3, 6]))
  rows = jnp.stack([tokens[0, 3:9], tokens[1, 6:12]])
  hidden, _, _ = forward(target, params, rows, cache, taps)
  logits = target.logits(params, hidden)
  expected = [golden["logits"][0, 3:9], golden["logits"][1, 6:12]]
  np.testing.assert_allclose(logits, expected, atol=TOLERANCE)


def test_random_parameters_have_the_shapes_of_loaded_ones(case):
  target, params, _ = case
  drawn = jax.eval_shape(target.init, jax.random.key(0))
  shapes = jax.tree.map(lambda x: x.shape, params)
  assert jax.tree.map(lambda x: x.shape, drawn) == shapes


# --- Trees --------------------------------------------------------------------


def random_tree(rng, batch, num_nodes):
  """Parents i32[B, P] of nodes that each hang anywhere before themselves."""
  parents = [[rng.integers(0, n + 1) for n in range(num_nodes)]] * batch
  depths = np.zeros((batch, num_nodes + 1), np.int32)
  for node in range(num_nodes):
    depths[:, node + 1] = depths[0, parents[0][node]] + 1
  return Tree(
    parents=jnp.asarray(parents, jnp.int32),
    depths=jnp.asarray(depths[:, 1:]),
    ranks=jnp.zeros((batch, num_nodes), jnp.int32),
  )


def path_to(tree, row):
  """Rows from the anchor to one row, in order."""
  path = [row]
  while path[-1]:
    path.append(int(tree.parents[0, path[-1] - 1]))
  return path[::-1]


TREES = [(case, nodes) for case in CACHE_CASES[:3] for nodes in (1, 11, 37)]


# Where there are windows, a tree that is deeper than they are long.
@pytest.mark.parametrize(
  ("name", "num_nodes"), [*TREES, ("gpt_oss", 37), ("gemma3", 37)]
)
def test_a_pass_over_a_tree_equals_a_pass_over_each_of_its_chains(
  name, num_nodes
):
  """Logits and taps of every node, behind a committed prompt."""
  target, params, golden = load_case(name)
  rng = np.random.default_rng(num_nodes)
  prompt = jnp.asarray(golden["tokens"][:, :5])
  batch, vocab = prompt.shape[0], target.config.vocab_size
  taps = taps_of(target)
  cache = target.init_cache(batch, 47)
  _, _, new = forward(target, params, prompt, cache, taps)
  cache = cache.extend(new, jnp.full((batch,), 5))
  tree = random_tree(rng, batch, num_nodes)
  tokens = jnp.asarray(rng.integers(0, vocab, (batch, num_nodes + 1)))
  hidden, states, _ = forward(target, params, tokens, cache, taps, tree)
  width = int(tree.depths.max()) + 1
  assert width > max(target.config.layer_windows, default=0)
  for row in range(num_nodes + 1):
    path = path_to(tree, row)
    chain = jnp.zeros((batch, width), jnp.int32)
    chain = chain.at[:, : len(path)].set(tokens[:, jnp.asarray(path)])
    alone, own, _ = forward(target, params, chain, cache, taps)
    last = len(path) - 1
    np.testing.assert_allclose(
      target.logits(params, hidden[:, row]),
      target.logits(params, alone[:, last]),
      atol=1e-4,
    )
    np.testing.assert_allclose(states[:, row], own[:, last], atol=1e-4)


def test_a_trunk_is_read_as_if_each_row_held_it(cache_case):
  """Of two rows one leans on it; chains and the nodes of a tree."""
  target, params, _ = cache_case
  rng = np.random.default_rng(0)
  text = jnp.asarray(rng.integers(0, target.config.vocab_size, (2, 12)))
  cache = target.init_cache(2, 31)
  _, _, rows = forward(target, params, text, cache, ())
  cache = cache.extend(rows, jnp.array([12, 9]))
  trunk = Trunk(
    tuple(x[0, :, :8] for x in cache.keys),
    tuple(x[0, :, :8] for x in cache.values),
    jnp.int32(7),
  )
  member = jnp.array([True, False])
  leaning = [
    jax.tree.map(lambda x, row=row: x[row][None], cache).lean(trunk, leans)
    for row, leans in enumerate(member)
  ]
  both = jax.tree.map(lambda *x: jnp.concatenate(x), *map(trunkless, leaning))
  both = dataclasses.replace(both, trunk=trunk, member=member)
  new = text[:, :5]
  parents = jnp.array([[0, 0, 1, 3], [0, 1, 1, 0]])
  tree = Tree(parents, jnp.array([[1, 1, 2, 3], [1, 2, 2, 1]]), parents)
  for nodes in (None, tree):
    want, _, _ = forward(target, params, new, cache, (), nodes)
    found, _, _ = forward(target, params, new, both, (), nodes)
    np.testing.assert_allclose(found, want, atol=1e-4, rtol=1e-4)


def trunkless(cache):
  return dataclasses.replace(cache, trunk=None, member=None)
