"""How the target chooses: argmax, and seeded noise that draws from its law."""

import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.sampling import GREEDY, Sampling, argmax, choose


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
