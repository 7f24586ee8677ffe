"""Noise by address: what it depends on, its law, and that streams are apart."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.noise import Stream, race_times, uniform

COUNT = 20_011


def seeds(*values):
  return jnp.array(values, jnp.uint32)


def test_a_draw_depends_on_its_address_alone():
  moments = jnp.array([[3, 4, 5], [9, 3, 1]])
  batch = uniform(Stream.DRAFT, seeds(7, 2)[:, None], moments, 13)
  assert batch.shape == (2, 3, 13)
  for row, seed in enumerate((7, 2)):
    for column in range(3):
      alone = uniform(Stream.DRAFT, seeds(seed), moments[row, column][None], 13)
      np.testing.assert_array_equal(alone[0], batch[row, column])
  np.testing.assert_array_equal(batch[0, 0] == batch[1, 1], np.zeros(13, bool))


def test_a_stream_may_differ_by_row():
  moments = jnp.array([5, 5])
  streams = jnp.array([Stream.RECOVERY, Stream.BONUS])
  both = uniform(streams, seeds(1, 1), moments, 7)
  for row, stream in enumerate((Stream.RECOVERY, Stream.BONUS)):
    one = uniform(stream, seeds(1), moments[:1], 7)
    np.testing.assert_array_equal(both[row], one[0])


def test_uniforms_fill_the_unit_interval_evenly():
  draws = np.asarray(uniform(Stream.ACCEPT, seeds(3), jnp.array([8]), COUNT))
  assert draws.min() > 0 and draws.max() <= 1
  counts, _ = np.histogram(draws, bins=37, range=(0, 1))
  expected = COUNT / 37
  chi2 = ((counts - expected) ** 2 / expected).sum()
  assert chi2 < 36 + 5 * np.sqrt(2 * 36)


def test_race_times_are_exponential_and_never_zero():
  times = np.asarray(race_times(Stream.CHOICE, seeds(3), jnp.array([8]), COUNT))
  assert times.min() > 0
  assert times.mean() == pytest.approx(1.0, abs=5 / np.sqrt(COUNT))
  assert (times < 1e-3).mean() == pytest.approx(1e-3, abs=5e-3 / 5)


def correlation(first: jax.Array, second: jax.Array) -> float:
  return float(np.corrcoef(np.ravel(first), np.ravel(second))[0, 1])


def test_streams_moments_and_seeds_are_uncorrelated():
  """Five standard deviations of a correlation of independent draws."""
  addresses = [(stream, 11, 6) for stream in Stream]
  addresses += [(Stream.DRAFT, 11, 7), (Stream.DRAFT, 12, 6)]
  draws = [
    np.asarray(uniform(stream, seeds(seed), jnp.array([moment]), COUNT))
    for stream, seed, moment in addresses
  ]
  limit = 5 / np.sqrt(COUNT)
  for first, second in itertools.combinations(draws, 2):
    assert abs(correlation(first, second)) < limit
  # The two halves of a row come from the two words of one cipher block.
  half = COUNT // 2
  for draw in draws:
    assert abs(correlation(draw[0, :half], draw[0, -half:])) < limit
  # The check sees what it is there for.
  assert abs(correlation(draws[0], draws[0])) > limit
