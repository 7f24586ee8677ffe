"""How the target chooses: argmax, and seeded noise that draws from its law."""

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import noise
from dflash_jax.config import ConfigError
from dflash_jax.noise import Stream
from dflash_jax.sampling import GREEDY, Sampling, argmax, choose, weigh


@pytest.mark.parametrize("vocab", [128, 384, 131, 7])
def test_argmax_is_numpys_and_ties_go_to_the_lowest_id(vocab):
  rng = np.random.default_rng(0)
  logits = rng.integers(0, 5, size=(3, 7, vocab)).astype(np.float32)
  np.testing.assert_array_equal(argmax(logits), logits.argmax(axis=-1))


def test_argmax_finds_the_last_entry():
  logits = np.zeros((2, 256), np.float32)
  logits[0, 255] = logits[1, 128] = 1.0
  np.testing.assert_array_equal(argmax(logits), [255, 128])


def positions(batch, count, first=0):
  return first + jnp.tile(jnp.arange(count), (batch, 1))


def test_greedy_ignores_seeds():
  logits = np.random.default_rng(0).normal(size=(2, 3, 11))
  logits = jnp.asarray(logits, jnp.float32)
  for seed in (1, 2):
    seeds = jnp.full((2,), seed, jnp.uint32)
    chosen = choose(logits, GREEDY, seeds, positions(2, 3))
    np.testing.assert_array_equal(chosen, logits.argmax(axis=-1))


def test_noise_depends_on_seed_and_position_not_on_row_or_width():
  logits = jnp.zeros((2, 5, 97))
  sampling = Sampling(temperature=1.0)
  seeds = jnp.array([3, 8], jnp.uint32)
  wide = choose(logits, sampling, seeds, positions(2, 5, first=10))
  swapped = choose(logits, sampling, seeds[::-1], positions(2, 5, first=10))
  np.testing.assert_array_equal(wide, swapped[::-1])
  one = choose(logits[:, :1], sampling, seeds, positions(2, 1, first=13))
  np.testing.assert_array_equal(one[:, 0], wide[:, 3])
  assert len(set(np.asarray(wide).ravel().tolist())) > 5


@pytest.mark.parametrize(
  ("sampling", "law"),
  [
    (Sampling(1.0), [0.5, 0.25, 0.2, 0.05]),
    (
      Sampling(0.5),
      [0.25 / 0.355, 0.0625 / 0.355, 0.04 / 0.355, 0.0025 / 0.355],
    ),
    (Sampling(1.0, min_p=0.3), [0.5 / 0.95, 0.25 / 0.95, 0.2 / 0.95, 0.0]),
    (Sampling(1.0, top_k=2), [2 / 3, 1 / 3, 0.0, 0.0]),
    (Sampling(1.0, top_p=0.8), [0.5 / 0.95, 0.25 / 0.95, 0.2 / 0.95, 0.0]),
    (Sampling(1.0, top_p=0.7), [2 / 3, 1 / 3, 0.0, 0.0]),
  ],
)
def test_draws_follow_the_law(sampling, law):
  draws = 20_011
  logits = jnp.log(jnp.array([0.5, 0.25, 0.2, 0.05]))
  logits = jnp.broadcast_to(logits, (1, draws, 4))
  seeds = jnp.array([5], jnp.uint32)
  chosen = choose(logits, sampling, seeds, positions(1, draws))
  counts = np.bincount(np.asarray(chosen[0]), minlength=4) / draws
  # Five standard deviations of a share of 20,011 draws.
  np.testing.assert_allclose(counts, law, atol=5 * 0.5 / np.sqrt(draws))
  assert counts[3] == 0 or law[3] > 0


def slow_weights(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
  """One row's law by sorting, in float64; ties with the last kept are kept."""
  scaled = logits.astype(np.float64) / sampling.temperature
  weights = np.exp(scaled - scaled.max())
  if sampling.top_k:
    last = np.sort(weights)[::-1][min(sampling.top_k, len(weights)) - 1]
    weights[weights < last] = 0
  needed = sampling.top_p * weights.sum()
  likelier = np.array([weights[weights > w].sum() for w in weights])
  weights[likelier >= needed] = 0
  weights[weights < sampling.min_p] = 0
  return weights


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(0.7),
    Sampling(1.3, top_k=5),
    Sampling(1.0, top_p=0.9),
    Sampling(0.6, top_k=17, top_p=0.5, min_p=0.05),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_k=1000),
  ],
  ids=str,
)
def test_restrictions_equal_those_of_a_sort(sampling):
  rng = np.random.default_rng(0)
  logits = (rng.normal(size=(3, 7, 131)) * 3).astype(np.float32)
  weights = np.asarray(weigh(jnp.asarray(logits), sampling))
  for row in np.ndindex(3, 7):
    expected = slow_weights(logits[row], sampling)
    np.testing.assert_array_equal(weights[row] > 0, expected > 0)
    np.testing.assert_allclose(weights[row], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
  "sampling",
  [
    Sampling(1.0, top_p=0.9),
    Sampling(0.3, top_p=0.5),
    Sampling(1.5, top_p=0.05),
    Sampling(0.6, top_k=17, top_p=0.5, min_p=0.05),
    Sampling(2.0, top_p=0.99, min_p=0.2),
  ],
  ids=str,
)
def test_choices_are_those_of_a_race_among_the_kept(sampling):
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(7, 61, 131)) * 2, jnp.float32)
  seeds = jnp.arange(7, dtype=jnp.uint32)
  where = positions(7, 61)
  times = noise.race_times(Stream.CHOICE, seeds[:, None], where, 131)
  expected = np.argmax(np.asarray(weigh(logits, sampling) / times), axis=-1)
  chosen = choose(logits, sampling, seeds, where)
  np.testing.assert_array_equal(chosen, expected)


def test_logits_that_are_no_numbers_end_a_race():
  logits = jnp.full((1, 2, 11), jnp.nan)
  seeds = jnp.zeros((1,), jnp.uint32)
  chosen = choose(logits, Sampling(1.0, top_p=0.9), seeds, positions(1, 2))
  assert chosen.shape == (1, 2)


def test_ties_with_the_last_kept_are_kept():
  logits = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.1, 0.1]))
  for sampling in (Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.5)):
    kept = np.asarray(weigh(logits, sampling)) > 0
    np.testing.assert_array_equal(kept, [True, True, True, False, False])


def test_greedy_weighs_one_token():
  logits = jnp.array([[0.0, 2.0, 2.0], [3.0, 1.0, 0.0]])
  weights = weigh(logits, GREEDY)
  np.testing.assert_array_equal(weights, [[0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
  "settings",
  [
    {"temperature": -0.5},
    {"temperature": float("nan")},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"min_p": 2.0},
  ],
)
def test_impossible_settings_are_refused_by_name_and_value(settings):
  ((name, value),) = settings.items()
  with pytest.raises(ConfigError, match=f"{name}={value} is impossible; use"):
    Sampling(**settings)
