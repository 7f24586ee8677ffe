"""python -m eval.main, as a user runs it."""

import json

import pytest

from tests.commands import TINY, run_each, run_module, save_tiny_drafter


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
  """An untrained drafter for configs/tiny.py, on disk."""
  return save_tiny_drafter(tmp_path_factory.mktemp("run") / "drafter")


@pytest.fixture
def prompts(tmp_path):
  """A prompt file of three replies in two prompts, and one too many."""
  path = tmp_path / "prompts.jsonl"
  path.write_text(
    '{"question": "Hello"}\n{"turns": ["a", "b"]}\n{"prompt": "unused"}\n'
  )
  return str(path)


def test_evaluates_a_drafter_and_writes_everything(drafter, prompts, tmp_path):
  results, plot = tmp_path / "results.json", tmp_path / "plot.png"
  done = run_module(
    "eval.main",
    f"--config={TINY}",
    f"--drafter={drafter}",
    f"--prompts={prompts}",
    "--limit=2",
    "--max_new_tokens=9",
    "--batch_size=2",
    "--ladder",
    f"--json_out={results}",
    f"--plot_out={plot}",
  )
  assert done.returncode == 0, done.stderr
  assert "tau per request" in done.stdout
  assert "the tokens of plain decoding with the same seed" in done.stdout
  record = json.loads(results.read_text())
  assert record["prompts"] == 2
  assert record["requests"] == 3
  assert record["identical_fraction"] == 1
  assert len(record["acceptance_per_position"]) == 3
  assert record["rule"] == "greedy"
  assert record["guarantee"] == "tokens"
  assert record["width"] == 3
  assert sum(record["histogram"]) == record["rounds"]
  assert record["config"]["eval"]["max_new_tokens"] == 9
  assert record["config"]["drafter"]["path"] == drafter
  assert record["prompt_set"]["name"] == "prompts"
  assert record["replies"]["prompt"] == [0, 1, 1]
  assert record["ladder"]["agreed_tokens"] == sum(record["replies"]["tokens"])
  assert plot.read_bytes().startswith(b"\x89PNG")


def test_sweeps_over_lines_given_by_flag(drafter, prompts, tmp_path):
  results, plot = tmp_path / "results.json", tmp_path / "plot.png"
  lines = '("width=fixed:1,fixed:3", "rule=block tree_nodes=4", "block_size=9")'
  done = run_module(
    "eval.main",
    "--sweep",
    f"--config={TINY}",
    f"--drafter={drafter}",
    f"--prompts={prompts}",
    "--temperature=1",
    "--draft_temperature=1",
    "--limit=1",
    "--max_new_tokens=5",
    f"--config.eval.sweep={lines}",
    f"--json_out={results}",
    f"--plot_out={plot}",
  )
  assert done.returncode == 0, done.stderr
  assert "speed-up" in done.stdout and done.stdout.count("refused:") == 2
  record = json.loads(results.read_text())
  one, three, block, nine = record["points"]
  assert record["config"]["eval"]["limit"] == record["prompts"] == 1
  assert one["width"] == 1 and three["width"] == 3
  assert one["rule"] == "coupled" and one["identical_fraction"] == 1
  assert "trees of drawn drafts" in block["refused"]
  assert "trained for 4" in nine["refused"]
  assert plot.read_bytes().startswith(b"\x89PNG")


def test_mistakes_end_with_one_line(drafter, prompts):
  sweep = ["--sweep", f"--prompts={prompts}"]
  given = [*sweep, f"--drafter={drafter}"]
  mistakes = {
    "--prompts=FILE is missing": [],
    "no drafter to compare": [f"--prompts={prompts}"],
    "no drafter to sweep": sweep,
    "drop one of them": [*given, "--ladder"],
    "'breadth' is no axis": [*given, "--config.eval.sweep=breadth=3"],
    "eval.sweep is empty": [*given, "--config.eval.sweep=()"],
  }
  lines = [[f"--config={TINY}", *mistake] for mistake in mistakes.values()]
  for complaint, done in zip(
    mistakes, run_each("eval.main", lines), strict=True
  ):
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and complaint in done.stderr
    assert done.stderr.count("\n") == 1
