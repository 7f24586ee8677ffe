"""python -m eval.main --benchmark, as a user runs it."""

import json

import pytest

from eval import benchmarks
from tests.commands import TINY, run_each, run_module, save_tiny_drafter
from tests.eval.benchmarks import published


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
  """An untrained drafter for configs/tiny.py, on disk."""
  return save_tiny_drafter(tmp_path_factory.mktemp("run") / "drafter")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return published.publish(tmp_path_factory.mktemp("data"))


def test_benchmark_is_decoded_judged_and_recorded(drafter, data_dir, tmp_path):
  results = tmp_path / "gsm8k.json"
  done = run_module(
    "eval.main",
    f"--config={TINY}",
    f"--drafter={drafter}",
    "--benchmark=gsm8k",
    f"--data_dir={data_dir}",
    "--limit=3",
    "--max_new_tokens=5",
    f"--json_out={results}",
  )
  assert done.returncode == 0, done.stderr
  assert "gsm8k: 3 of 5 tasks" in done.stdout
  assert "accuracy, speculative" in done.stdout
  record = json.loads(results.read_text())
  assert record["prompts"] == record["requests"] == 3
  assert record["identical_fraction"] == 1
  assert record["benchmark"]["of"] == 5
  assert record["benchmark"]["source"] == f"{data_dir}/gsm8k/test.jsonl"
  accuracy = record["accuracy"]
  assert accuracy["n"] == 3 and accuracy["unlike"] == 0
  assert accuracy["plain"] == accuracy["speculative"]


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmarks.NAMES)
def test_every_benchmark_runs_from_a_folder(drafter, data_dir, tmp_path, name):
  results = tmp_path / "results.json"
  done = run_module(
    "eval.main",
    f"--config={TINY}",
    f"--drafter={drafter}",
    f"--benchmark={name}",
    f"--data_dir={data_dir}",
    "--config.decode.max_length=2048",
    "--limit=0",
    "--batch_size=8",
    "--max_new_tokens=3",
    "--run_code=unisolated",
    f"--json_out={results}",
  )
  assert done.returncode == 0, done.stderr
  record = json.loads(results.read_text())
  found = benchmarks.load(name, data_dir)
  turns = sum(len(prompt.turns) for prompt in found.prompts)
  assert record["requests"] == turns
  assert record["benchmark"]["name"] == name
  assert ("accuracy" in record) == bool(found.scored)
  assert ("by_category" in record) == any(found.categories)


def test_mistakes_end_with_one_line(drafter, data_dir, tmp_path):
  gsm8k = ["--benchmark=gsm8k", f"--data_dir={data_dir}"]
  mistakes = {
    "--prompts=FILE is missing; name a file of JSON lines, or --benchmark=": [],
    "are two sources": [*gsm8k, "--prompts=x.jsonl"],
    "--data_dir and --run_code belong to": [
      "--prompts=x.jsonl",
      "--run_code=isolated",
    ],
    "not a sweep": [*gsm8k, "--sweep", "--run_code=isolated"],
    "no data in": ["--benchmark=mbpp", f"--data_dir={tmp_path}"],
    "no switch for thinking": [*gsm8k, "--thinking=on"],
    "target.thinking='maybe' is unknown": [
      *gsm8k,
      "--config.target.thinking=maybe",
    ],
  }
  lines = [
    [f"--config={TINY}", f"--drafter={drafter}", *mistake]
    for mistake in mistakes.values()
  ]
  for complaint, done in zip(
    mistakes, run_each("eval.main", lines), strict=True
  ):
    assert done.returncode == 2, complaint
    assert done.stderr.startswith("error: ") and complaint in done.stderr
    assert done.stderr.count("\n") == 1
