"""Means, spreads and intervals, against brute force."""

import itertools
import math
import statistics

import numpy as np
import pytest

from eval.bootstrap import Interval, pigeonhole
from train.ablation.comparison import Spread, compare
from train.ablation.results import Results
from train.ablation.summary import summarize


def reply(arm="a", seed=0, place=0, **values):
  """A record of a reply, one number of which may matter."""
  return {
    "kind": "reply",
    "arm": arm,
    "seed": seed,
    "point": "width=fixed:3",
    "prompts": "few",
    "place": place,
    "tau": 2.0,
    "rounds": 5,
    "tokens": 11,
    "seconds": 0.01,
    "plain_seconds": 0.02,
    "identical": True,
    "guarantee": "tokens",
    **values,
  }


# --- Intervals ----------------------------------------------------------------


def every_draw(table):
  """Means of all S^S x P^P equally likely draws of rows and columns."""
  seeds, prompts = table.shape
  rows = itertools.product(range(seeds), repeat=seeds)
  columns = list(itertools.product(range(prompts), repeat=prompts))
  return [
    statistics.fmean(table[s, p] for s in drawn for p in asked)
    for drawn in rows
    for asked in columns
  ]


@pytest.mark.parametrize("shape", [(1, 5), (2, 4), (3, 4)])
def test_interval_is_that_of_all_draws_of_seeds_and_prompts(shape):
  table = np.random.default_rng(shape[1]).normal(size=shape)
  found = pigeonhole(table, draws=60_000)
  low, high = np.percentile(every_draw(table), [2.5, 97.5])
  assert found.value == pytest.approx(table.mean())
  assert found.low == pytest.approx(low, abs=0.02)
  assert found.high == pytest.approx(high, abs=0.02)


def test_many_prompts_do_not_make_up_for_few_seeds():
  """Drawing replies one by one would find an interval six times narrower."""
  table = np.repeat([[-1.0], [1.0]], 150, axis=1)
  found = pigeonhole(table)
  assert (found.low, found.high) == (-1.0, 1.0)


def test_an_interval_says_what_it_excludes():
  assert Interval(0.2, 0.1, 0.3).excludes(0.0)
  assert not Interval(0.2, -0.1, 0.3).excludes(0.0)
  assert not Interval(0.2, 0.0, 0.3).excludes(0.0)


# --- Pairs --------------------------------------------------------------------


def test_arms_are_compared_reply_by_reply():
  rng = np.random.default_rng(0)
  ours, theirs = [], []
  for seed, place in itertools.product((3, 5), range(7)):
    # Prompts differ far more than arms do.
    tau, pace = 2 + place, 0.01 * (1 + place)
    theirs.append(reply("b", seed, place, tau=tau, seconds=pace))
    gain = 0.1 + 0.01 * rng.normal()
    ours.append(reply("a", seed, place, tau=tau + gain, seconds=pace / 1.25))
  found = compare(ours, rng.permutation(theirs))
  gains = [a["tau"] - b["tau"] for a, b in zip(ours, theirs, strict=True)]
  assert found.tau.value == pytest.approx(statistics.fmean(gains))
  assert found.tau.excludes(0.0) and found.tau.high - found.tau.low < 0.05
  assert found.share == pytest.approx(statistics.fmean(gains) / 5.0)
  assert found.speed.value == pytest.approx(1.25)
  assert (found.seeds, found.replies) == (2, 7)


def test_only_what_both_have_is_compared():
  ours = [reply("a", s, p, tau=3.0) for s in (0, 1, 2) for p in (0, 1, 2)]
  theirs = [reply("b", s, p) for s in (1, 2, 4) for p in (1, 2, 3)]
  # Of one token, without a round.
  theirs += [reply("b", s, 0, rounds=0, tau=0.0) for s in (1, 2, 4)]
  found = compare(ours, theirs)
  assert (found.seeds, found.replies) == (2, 2)
  assert found.tau.value == 1.0
  assert compare(ours, [reply("b", 7, 0)]) is None
  assert compare(ours, []) is None


def test_an_arm_without_seeds_stands_against_each():
  ours = [reply("a", s, p, tau=2 + s) for s in (0, 1) for p in (0, 1)]
  theirs = [reply("ngram", None, p, tau=1.0) for p in (0, 1)]
  found = compare(ours, theirs)
  assert (found.seeds, found.tau.value) == (2, 1.5)
  assert compare(theirs, ours).tau.value == -1.5
  assert compare(theirs, theirs).seeds == 1


# --- Summaries ----------------------------------------------------------------


def test_numbers_of_an_arm_are_means_over_its_seeds(tmp_path):
  rng = np.random.default_rng(1)
  results = Results(tmp_path)
  found = [
    reply(
      seed=seed,
      place=place,
      prompts=prompts,
      tau=float(rng.uniform(1, 3)),
      seconds=float(rng.uniform(0.01, 0.02)),
      plain_seconds=float(rng.uniform(0.02, 0.03)),
      identical=bool(rng.random() > 0.3),
    )
    for seed in (0, 1, 2)
    for prompts, count in (("few", 3), ("more", 5))
    for place in range(count)
  ]
  results.add([*found, reply(place=9, rounds=0, tau=0.0, seconds=0.0)])
  cells = {cell.prompts: cell for cell in summarize(results)}
  assert list(cells) == ["", "few", "more"]
  for prompts, cell in cells.items():
    mine = [r for r in found if prompts in ("", r["prompts"])]
    by_seed = [[r for r in mine if r["seed"] == s] for s in (0, 1, 2)]
    taus = [np.mean([r["tau"] for r in rs]) for rs in by_seed]
    assert cell.tau.mean == pytest.approx(np.mean(taus))
    assert cell.tau.deviation == pytest.approx(np.std(taus, ddof=1))
    assert cell.tau.values == pytest.approx(taus)
    for name, value in {
      "tokens_per_s": lambda r: 1 / r["seconds"],
      "plain_tokens_per_s": lambda r: 1 / r["plain_seconds"],
      "speedup": lambda r: r["plain_seconds"] / r["seconds"],
      "round_ms": lambda r: 1e3 * r["seconds"] * r["tau"],
    }.items():
      expected = [np.median([value(r) for r in rs]) for rs in by_seed]
      assert getattr(cell, name).values == pytest.approx(expected), name
  same = [r["identical"] for r in found if r["prompts"] == "more"]
  assert cells["more"].identical == pytest.approx(np.mean(same))


def test_a_single_seed_has_no_deviation():
  assert Spread.of([2.0]) == Spread(2.0, None, (2.0,))
  assert math.isclose(Spread.of([1.0, 3.0]).deviation, math.sqrt(2))
