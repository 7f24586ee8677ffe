"""Experts against a sum over all of them, in numpy and float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dflash_jax import experts as experts_lib
from dflash_jax.experts import Experts, Tiles
from dflash_jax.target_network import ConfigError, Gate
from dflash_jax.target_network import Experts as ExpertsConfig
from tests.testing import tiny_target_config

D, F, E = 10, 14, 7
CONFIG = tiny_target_config(
  width=D, experts=ExpertsConfig(count=E, top_k=3, width=F)
)
VARIANTS = {
  "of the chosen": {},
  "of all": {"experts": {"renormalize": False}},
  "one": {"experts": {"top_k": 1}},
  "every": {"experts": {"top_k": E}},
  "biased": {"experts": {"bias": True}, "gate": Gate("clamped", 1.3, 0.7)},
  "gelu": {"gate": Gate("gelu_tanh")},
}


def build(experts=None, **changes):
  """A module whose parameters, biases too, are large and random."""
  sizes = dataclasses.replace(CONFIG.experts, **(experts or {}))
  config = dataclasses.replace(CONFIG, experts=sizes, **changes)
  module = Experts(config, rngs=nnx.Rngs(0))
  graph, state = nnx.split(module)
  keys = iter(jax.random.split(jax.random.key(3), 20))
  params = jax.tree.map(
    lambda x: 0.7 * jax.random.normal(next(keys), x.shape),
    nnx.to_pure_dict(state),
  )
  return config, params, nnx.merge(graph, nnx.State(params))


def run(module, rows):
  """Compiled as one program."""
  return jax.jit(lambda rows: module(rows))(rows)


def rows_of(count, seed=1):
  return jax.random.normal(jax.random.key(seed), (1, count, D))


def open_by_hand(gate, x, up):
  if gate.kind == "silu":
    return x / (1 + np.exp(-x)) * up
  if gate.kind == "gelu_tanh":
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + np.tanh(inner)) * up
  x, up = np.minimum(x, gate.limit), np.clip(up, -gate.limit, gate.limit)
  return x / (1 + np.exp(-gate.slope * x)) * (up + 1)


def by_hand(config, params, rows):
  """Every expert of every row, weighted by 0 unless it was chosen."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  experts = config.experts
  out = np.zeros(rows.shape)
  for i, row in enumerate(np.asarray(rows, np.float64)):

    def linear(name, x, expert):
      y = x @ p[name]["kernel"][expert]
      return y + p[name]["bias"][expert] if experts.bias else y

    scores = row @ p["router"]["kernel"]
    scores = scores + p["router"]["bias"] if experts.bias else scores
    odds = np.exp(scores)
    chosen = np.argsort(-scores)[: experts.top_k]
    odds /= odds[chosen].sum() if experts.renormalize else odds.sum()
    for expert in chosen:
      gate, up = linear("gate", row, expert), linear("up", row, expert)
      opened = open_by_hand(config.gate, gate, up)
      out[i] += odds[expert] * linear("down", opened, expert)
  return out


@pytest.mark.parametrize("count", [1, 67])
@pytest.mark.parametrize("kind", VARIANTS)
def test_experts_are_what_the_definition_says(kind, count):
  config, params, module = build(**VARIANTS[kind])
  rows = rows_of(count)
  want = by_hand(config, params, rows[0])
  np.testing.assert_allclose(run(module, rows)[0], want, 2e-5, 2e-5)


def test_tiles_taken_at_once_are_those_taken_in_turn(monkeypatch):
  """As on an accelerator; the last batch is not full."""
  _, _, module = build(experts={"bias": True})
  rows = rows_of(29)
  want = run(module, rows)
  monkeypatch.setattr(experts_lib, "TILES_AT_ONCE", 4)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  np.testing.assert_allclose(run(module, rows), want, 1e-5, 1e-5)


def test_a_token_gets_the_same_in_any_company():
  """Whatever the others choose, and whatever the tiles' size."""
  _, _, module = build()
  rows = rows_of(67)
  together = run(module, rows)[0]
  for row in (0, 31, 66):
    alone = run(module, rows[:, row : row + 1])[0, 0]
    np.testing.assert_allclose(together[row], alone, 1e-5, 1e-5)
  crowd = jnp.broadcast_to(rows[:, 5:6], rows.shape).at[:, 40].set(rows[:, 3])
  np.testing.assert_allclose(run(module, crowd)[0, 40], together[3], 1e-5, 1e-5)


@pytest.mark.parametrize("kind", ["random", "all the same", "one each"])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 3), (11, 2), (97, 4)])
def test_every_pair_has_a_row_of_its_own_in_a_tile_of_its_expert(
  tokens, top_k, kind
):
  rng = np.random.default_rng(tokens)
  if kind == "random":
    chosen = np.stack([rng.permutation(E)[:top_k] for _ in range(tokens)])
  elif kind == "all the same":
    chosen = np.tile(np.arange(top_k), (tokens, 1))
  else:
    chosen = (np.arange(tokens)[:, None] + np.arange(top_k)) % E
  tiles = Tiles.lay(jnp.asarray(chosen, jnp.int32), E)
  place = np.asarray(tiles.place)
  assert len(np.unique(place)) == place.size
  assert place.min() >= 0 and place.max() < len(tiles.expert) * tiles.size
  np.testing.assert_array_equal(tiles.expert[place // tiles.size], chosen)
  rows = jnp.asarray(rng.normal(size=(tokens, D)), jnp.float32)
  filled = np.asarray(tiles.fill(rows)).reshape(-1, D)
  for pair in np.ndindex(tokens, top_k):
    np.testing.assert_array_equal(filled[place[pair]], rows[pair[0]])
  assert np.count_nonzero(filled.any(axis=-1)) == tokens * top_k


def test_the_choice_is_made_in_float32():
  """Two experts that bfloat16 cannot tell apart, but float32 can."""
  _, params, module = build(experts={"top_k": 1})
  kernel = jnp.zeros((D, E)).at[0, 4].set(1.0).at[0, 5].set(1.0)
  kernel = kernel.at[1, 5].set(1.0)
  module.router.kernel[...] = kernel.astype(jnp.bfloat16)
  rows = jnp.zeros((1, D)).at[0, 0].set(1.0).at[0, 1].set(2.0**-12)
  chosen, _ = module.route(rows)
  assert int(chosen[0, 0]) == 5


@pytest.mark.parametrize("top_k", [0, E + 1])
def test_an_impossible_number_of_choices_is_named(top_k):
  with pytest.raises(ConfigError, match=rf"top_k={top_k} .*{E} experts"):
    ExpertsConfig(count=E, top_k=top_k, width=F)
