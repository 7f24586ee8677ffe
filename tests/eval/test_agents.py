"""python -m eval.agents, as a user runs it."""

import json

import pytest

from tests.commands import TINY, run_module, save_tiny_drafter

CALLS = (
  '("pair/first*2: {task}", "pair/second after first: {first}", '
  '"one/only temperature=1: {task}")'
)


@pytest.mark.slow
def test_measures_writes_everything_and_names_mistakes(tmp_path):
  drafter = save_tiny_drafter(tmp_path / "drafter")
  tasks = tmp_path / "tasks.jsonl"
  tasks.write_text("".join(f'{{"prompt": "Task {i}"}}\n' for i in range(4)))
  results, plot = tmp_path / "results.json", tmp_path / "plot.png"
  report = tmp_path / "report.md"
  arguments = [
    f"--config={TINY}",
    f"--drafter={drafter}",
    f"--config.agents.calls={CALLS}",
    f'--config.agents.tasks=("{tasks}",)',
    "--config.agents.max_new_tokens=5",
    "--config.agents.rows=(1,2)",
    "--config.agents.prefix_bytes=4000000",
    "--chains=1",
  ]
  done = run_module(
    "eval.agents",
    *arguments,
    "--concurrency=1,2",
    f"--json_out={results}",
    f"--plot_out={plot}",
    f"--report={report}",
  )
  assert done.returncode == 0, done.stderr
  assert "pair: 3 requests a chain, 2 one after the other" in done.stdout
  assert "nothing was compiled meanwhile" in done.stdout
  record = json.loads(results.read_text())
  found = record["measurements"]
  assert len(found) == 2 * 2 * 4
  assert [each["chains"] for each in found[::4]] == [1, 4, 1, 4]
  assert {each["identical_chains"] for each in found} == {1}
  assert record["config"]["agents"]["concurrency"] == [1, 2]
  assert plot.read_bytes().startswith(b"\x89PNG")
  assert "](plot.png)" in report.read_text()

  for complaint, mistake in {
    "'trio' is unknown": "--workflows=trio",
    "not 'two'": "--concurrency=1,two",
    "must end in .md": "--report=report.html",
  }.items():
    done = run_module("eval.agents", *arguments, mistake)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and complaint in done.stderr
    assert done.stderr.count("\n") == 1
