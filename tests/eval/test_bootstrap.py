"""Intervals: against every possible draw, and against the truth."""

import itertools
import statistics

import numpy as np
import pytest

from eval import bootstrap


def every_draw(prompts):
  """Weights of all equally likely draws of prompts, all replies of each."""
  names = sorted(set(prompts))
  return np.array(
    [
      [drawn.count(prompt) for prompt in prompts]
      for drawn in itertools.product(names, repeat=len(names))
    ]
  )


def test_replies_of_a_prompt_are_drawn_together():
  weights = bootstrap.draw([5, 2, 5, 9, 2, 5], draws=500)
  assert weights.shape == (500, 6)
  for first, *others in ([0, 2, 5], [1, 4]):
    assert all((weights[:, first] == weights[:, n]).all() for n in others)
  by_prompt = weights[:, [0, 1, 3]]
  assert (by_prompt.sum(axis=1) == 3).all()
  assert len(np.unique(by_prompt, axis=0)) == 10  # all there are


def test_equal_seeds_draw_equal_replies():
  drawn = [bootstrap.draw([0, 1, 1, 2], 50, seed) for seed in (3, 3, 4)]
  assert (drawn[0] == drawn[1]).all()
  assert (drawn[0] != drawn[2]).any()


@pytest.mark.parametrize("prompts", [[0, 1, 2, 3], [0, 0, 0, 1, 2, 2]])
def test_intervals_are_those_of_all_draws(prompts):
  rng = np.random.default_rng(len(prompts))
  tokens, rounds = rng.integers(5, 60, (2, len(prompts)))
  many = bootstrap.draw(prompts, 60_000)
  exact = every_draw(prompts)
  for number in (
    lambda weights: bootstrap.ratio(tokens, rounds, weights),
    lambda weights: bootstrap.median(tokens / rounds, weights),
  ):
    low, high = bootstrap.bounds(number(many))
    # Each draw many times, so that percentiles do not lie between two.
    each = np.repeat(number(exact), 100)
    expected = np.percentile(each, [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(expected), rel=0.02)


def test_median_and_ratio_are_those_of_the_replies_drawn():
  rng = np.random.default_rng(7)
  values = rng.normal(size=9).round(1)  # some are equal
  below = rng.integers(1, 4, 9)
  weights = rng.integers(0, 4, (40, 9))
  weights[0], weights[1] = 0, 1
  medians = bootstrap.median(values, weights)
  ratios = bootstrap.ratio(values, below, weights)
  assert np.isnan(medians[0]) and np.isnan(ratios[0])
  for row, found, share in zip(
    weights[1:], medians[1:], ratios[1:], strict=True
  ):
    drawn = np.repeat(values, row)
    assert found == pytest.approx(statistics.median(drawn))
    assert share == pytest.approx(drawn.sum() / np.repeat(below, row).sum())
  assert np.isnan(bootstrap.median(np.zeros(0), np.zeros((3, 0), int))).all()


def test_bounds_leave_out_draws_without_a_value():
  draws = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [3.0, 1.0]])
  low, high = bootstrap.bounds(draws)
  assert (low[0], high[0]) == pytest.approx((1.05, 2.95))
  low, high = bootstrap.bounds(np.full((5, 2), np.nan))
  assert np.isnan(low).all() and np.isnan(high).all()


def cover(prompts_of, trials=1000):
  """Share of simulated measurements whose interval covers the true mean.

  24 prompts of 3 turns; turns of a prompt are alike.
  """
  rng, hits = np.random.default_rng(0), 0
  for _ in range(trials):
    ease = np.repeat(rng.normal(size=24), 3)
    values = 2 + ease + 0.3 * rng.normal(size=72)
    weights = bootstrap.draw(prompts_of(72), 400)
    low, high = bootstrap.bounds(bootstrap.ratio(values, np.ones(72), weights))
    hits += low <= 2 <= high
  return hits / trials


def test_intervals_cover_the_truth_as_often_as_they_say():
  # Percentiles of 24 prompts are a little narrow.
  assert 0.90 <= cover(lambda count: np.arange(count) // 3) <= 0.97


def test_splitting_the_turns_of_a_prompt_would_not_cover():
  assert cover(np.arange) < 0.82
