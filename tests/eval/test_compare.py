"""Comparisons of two records: paired, or said not to be."""

import dataclasses

import numpy as np
import pytest

from dflash_jax.prompts import Prompt
from eval import compare, runs
from tests.commands import run_each
from tests.eval import reports

PROMPTS = [Prompt((str(place),)) for place in range(12)]


def row(place, gain):
  """A reply whose prompt decides far more than `gain` does."""
  return [2] * (1 + place) + [0] * (12 - gain), 0.02 / (1 + gain / 10), 0.04


def read(tmp_path, name, record):
  """The one run of a record."""
  (run,), _ = runs.read([reports.save({name: record}, tmp_path / name)])
  return run


@pytest.fixture
def pair(tmp_path):
  """Two drafters on the same prompts; the second accepts a little more."""
  made = [
    reports.make(
      [row(place, gain) for place in range(12)],
      prompts=PROMPTS,
      drafter=name,
    )
    for name, gain in (("a", 0), ("b", 1))
  ]
  return tuple(read(tmp_path, n, r) for n, r in zip("ab", made, strict=True))


def by_name(found):
  """Differences by their numbers' names."""
  return {each.name: each for each in found}


def test_same_prompts_are_drawn_together(pair):
  found = by_name(compare.compare(*pair, compare.pair_up(*pair)))
  tau = found["tau_per_request"]
  # Reply p of `row` has p + 13 rounds less the gain, and two drafts in p + 1.
  taus = [
    np.mean([1 + 2 * (p + 1) / (p + 13 - gain) for p in range(12)])
    for gain in (0, 1)
  ]
  assert (tau.here, tau.there) == pytest.approx(tuple(taus))
  assert tau.interval.value == pytest.approx(taus[1] - taus[0])
  # Prompts differ far more than drafters, and yet it is clear.
  assert tau.is_clear and tau.interval.high - tau.interval.low < 0.1
  speed = found["speculative_tokens_per_s"]
  assert speed.is_ratio and speed.interval.value == pytest.approx(1.1, 1e-4)
  assert speed.interval.low == pytest.approx(1.1, 1e-4)
  assert speed.interval.high == pytest.approx(1.1, 1e-4)
  assert found["speedup"].interval.value == pytest.approx(1.1, 1e-4)
  assert found["plain_tokens_per_s"].interval.value == pytest.approx(1.0)
  assert not found["plain_tokens_per_s"].is_clear


def test_drawing_them_apart_would_say_nothing(pair):
  apart = by_name(compare.compare(*pair, None))["tau_per_request"]
  assert not apart.is_clear
  assert apart.interval.high - apart.interval.low > 0.3


def test_order_of_replies_does_not_matter(pair):
  ours, theirs = pair
  order = np.random.default_rng(0).permutation(12)
  shuffled = dataclasses.replace(theirs, replies=theirs.replies.take(order))
  found = compare.compare(ours, shuffled, compare.pair_up(ours, shuffled))
  assert found == compare.compare(ours, theirs, compare.pair_up(ours, theirs))


def test_text_says_how_they_were_drawn(pair):
  text = compare.describe(*pair)
  assert "Paired over the same 12 prompts" in text
  assert "config.drafter.path: 'runs/a' -> 'runs/b'" in text
  assert "Decoded at other times" in text
  assert "NOT COMPARABLE" not in text and "UNPAIRED" not in text


def test_other_prompts_are_not_paired(pair, tmp_path):
  other = reports.make(
    [row(place, 1) for place in range(12)],
    prompts=[Prompt((f"other {place}",)) for place in range(12)],
  )
  text = compare.describe(pair[0], read(tmp_path, "c", other))
  assert "UNPAIRED" in text and "prompt_set.digest" in text


def test_records_without_replies_have_no_intervals(pair, tmp_path):
  old = dict(pair[1].record)
  del old["replies"]
  text = compare.describe(pair[0], read(tmp_path, "old", old))
  assert "No intervals" in text and "1.100x" not in text


def test_interleaved_records_are_known(pair, tmp_path):
  together = {"interleaved": {"prompts": "few", "began": "2026-01-01"}}
  two = [
    read(tmp_path, name, run.record | together)
    for name, run in zip("xy", pair, strict=True)
  ]
  assert "Decoded in turns, in one process." in compare.describe(*two)


@pytest.mark.parametrize(
  "section, field, value",
  [
    ("target", "path", "another/target"),
    ("target", "dtype", "bfloat16"),
    ("eval", "max_new_tokens", 512),
    ("decode", "temperature", 1.0),
  ],
)
def test_what_cannot_be_compared_is_warned_of(
  section, field, value, pair, tmp_path
):
  config = dict(pair[1].record["config"])
  config[section] = config[section] | {field: value}
  other = read(tmp_path, "c", pair[1].record | {"config": config})
  text = compare.describe(pair[0], other)
  assert f"NOT COMPARABLE: config.{section}.{field}" in text


def test_other_conventions_are_warned_of(pair, tmp_path):
  other = pair[1].record | {"conventions": {"tau": "bonus token left out"}}
  assert "CONVENTIONS DIFFER" in compare.describe(
    pair[0], read(tmp_path, "c", other)
  )


def test_other_machines_are_named(pair, tmp_path):
  machine = pair[1].record["machine"] | {"cpu": "another"}
  other = read(tmp_path, "c", pair[1].record | {"machine": machine})
  assert "Decoded on other machines" in compare.describe(pair[0], other)


def test_program_compares_files_and_directories(tmp_path):
  first = reports.save(reports.full(), tmp_path / "first")
  second = reports.full()
  alone = next(iter(second))
  del second[alone]
  directories = [first, reports.save(second, tmp_path / "second")]
  files = [f"{tmp_path}/first/few.{name}.0.json" for name in ("mine", "ngra")]
  apart = [
    reports.save(
      {each: reports.make(name=each) for each in names}, tmp_path / names
    )
    for names in ("xy", "zw")
  ]
  both, two, one, none, missing = run_each(
    "eval.compare", [directories, files, files[:1], apart, [first, "nowhere"]]
  )
  assert both.returncode == two.returncode == 0, both.stderr + two.stderr
  assert both.stdout.count("A: ") == 7 and "only in " in both.stdout
  assert two.stdout.count("A: ") == 1 and "B: few, ngram" in two.stdout
  for done, complaint in (
    (one, "1 records are named"),
    (none, "have no prompt set, drafter and temperature in common"),
    (missing, "cannot read nowhere"),
  ):
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert complaint in done.stderr
