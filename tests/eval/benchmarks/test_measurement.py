"""What replies show: accuracy both ways, its interval, tau by category."""

import dataclasses
import json

import pytest

from dflash_jax.compare import Comparison
from eval.benchmarks import load, measure, to_table
from eval.benchmarks.measurement import wilson
from tests.eval.benchmarks import published
from tests.eval.benchmarks.test_trials import LIMITS
from tests.eval.test_records import reply


def compared(*pairs):
  """(speculative, plain) texts as comparisons."""
  return [
    Comparison(
      dataclasses.replace(reply(6, [1, 0, 2]), text=ours),
      dataclasses.replace(reply(6, [3]), text=theirs),
    )
    for ours, theirs in pairs
  ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return published.publish(tmp_path_factory.mktemp("data"))


def test_accuracy_of_both_ways(data_dir):
  benchmark = load("gsm8k", data_dir)
  right = [f"\\boxed{{{answer}}}" for answer in benchmark.references]
  pairs = list(zip(right, right, strict=True))
  pairs[1] = (right[1], "\\boxed{1}")
  pairs[2] = ("\\boxed{1}", "\\boxed{2}")
  found = measure(benchmark, compared(*pairs), max_new_tokens=99)
  accuracy = found["accuracy"]
  assert accuracy["speculative"] == pytest.approx(4 / 5)
  assert accuracy["plain"] == pytest.approx(3 / 5)
  assert accuracy["n"] == 5 and accuracy["unlike"] == 1
  assert accuracy["unfinished"] == 0
  assert accuracy["interval"]["plain"] == wilson(3, 5)
  assert "\\boxed{}" in accuracy["how"]
  assert found["benchmark"]["seed"] == 42
  assert "by_category" not in found
  json.dumps(found)
  table = to_table(found)
  assert "gsm8k: 5 of 5 tasks" in table
  assert "80.0%" in table and "60.0%" in table and "1 judged unlike" in table


def test_answers_are_those_of_their_own_prompts(data_dir):
  benchmark = load("math500", data_dir)
  boxed = [f"\\boxed{{{answer}}}" for answer in benchmark.references]
  pairs = list(zip(boxed, boxed[::-1], strict=True))
  found = measure(benchmark, compared(*pairs), max_new_tokens=99)
  assert found["accuracy"]["speculative"] == 1
  assert found["accuracy"]["plain"] == pytest.approx(1 / 3)


def test_replies_that_ran_out_of_tokens_are_counted(data_dir):
  benchmark = load("gsm8k", data_dir, limit=1)
  found = measure(benchmark, compared(("", "")), max_new_tokens=7)
  assert found["accuracy"]["unfinished"] == 1
  assert "1 of 1 unfinished" in to_table(found)


def test_every_turn_counts_for_the_category_of_its_prompt(data_dir):
  benchmark = load("spec-bench", data_dir)
  accepted = {"mt_bench": [0, 1], "translation": [5, 0], "rag": [2, 3]}
  comparisons = [
    Comparison(reply(6, accepted[category]), reply(6, [3]))
    for prompt, category in zip(
      benchmark.prompts, benchmark.categories, strict=True
    )
    for _ in prompt.turns
  ]
  found = measure(benchmark, comparisons, max_new_tokens=99)
  rows = found["by_category"]
  assert {name: row["requests"] for name, row in rows.items()} == {
    "mt_bench": 2,
    "translation": 1,
    "rag": 1,
  }
  assert rows["mt_bench"]["histogram"] == [0, 2]
  assert rows["translation"]["tau_per_round"] == pytest.approx(6 / 5)
  assert rows["rag"]["tau_per_request"] == pytest.approx(6 / 5)
  assert "accuracy" not in found
  table = to_table(found)
  assert "translation" in table and "6.000 tau/reply" in table


def test_programs_are_run_only_if_asked_for(data_dir):
  benchmark = load("humaneval", data_dir)
  code = {
    "half": "```python\ndef half(x):\n  return math.ceil(x / 2)\n```",
    "twice": "```python\ndef twice(x):\n  return x\n```",
  }
  texts = [code[program.name] for program in benchmark.references]
  comparisons = compared(*zip(texts, texts, strict=True))
  found = measure(benchmark, comparisons, max_new_tokens=99)
  assert "accuracy" not in found
  found = measure(benchmark, comparisons, max_new_tokens=99, limits=LIMITS)
  assert found["accuracy"]["plain"] == found["accuracy"]["speculative"] == 0.5
  assert "passes the benchmark's tests, in 20 s" in found["accuracy"]["how"]
  assert "isolated" in found["accuracy"]["how"]


@pytest.mark.parametrize(
  ("right", "n"), [(0, 4), (1, 4), (3, 5), (10, 10), (812, 1319)]
)
def test_interval_is_wilsons(right, n):
  """At either end, what was observed is 1.96 standard deviations away."""
  share = right / n
  low, high = wilson(right, n)
  assert 0 <= low < high <= 1
  for end in (low, high):
    deviation = (end * (1 - end) / n) ** 0.5
    assert abs(share - end) == pytest.approx(1.959964 * deviation, abs=1e-7)
