"""What an ablation writes of itself: the grid, and each run that is trained."""

import dataclasses
import json
import statistics
from typing import Any

from eval.records import circumstances
from train.ablation.grid import Grid, Trial
from train.ablation.judge import point_name
from train.ablation.prepare import read_corpus
from train.ablation.results import Record, Results
from train.corpus import identify_target
from train.files import FileError


def describe_grid(
  grid: Grid,
  parameters: dict[str, int],
  results: Results,
  command: str,
) -> Record:
  """The record of a grid, from which its report is made.

  Args:
    grid: of arms.
    parameters: of each arm's drafter.
    results: so far, which must be of drafters judged in the same way.
    command: that started this.

  Raises:
    FileError: if they were judged otherwise, by what differs.
  """
  around = circumstances(grid.config)
  judged = _describe_judging(grid, around["machine"])
  check_judging(results, judged)
  trained = next(arm for arm in grid.arms if arm.is_trained).config.train
  corpus = read_corpus(trained.corpus)
  return {
    "kind": "grid",
    "command": command,
    "target": str(identify_target(grid.config.target)),
    "training": {
      "steps": trained.steps,
      "batch_size": trained.batch_size,
      "num_anchors": trained.num_anchors,
      "sequences": len(corpus.train),
      "tokens": int(corpus.lengths[corpus.train].sum()),
    },
    "arms": [
      {
        "name": arm.name,
        "settings": arm.settings,
        "parameters": parameters[arm.name],
      }
      for arm in grid.arms
    ],
    "pairs": [dataclasses.asdict(pair) for pair in grid.pairs],
    "points": [point_name(point) for point in grid.points],
    "judged": judged,
    **{name: around[name] for name in ("machine", "versions", "date")},
  }


def _describe_judging(grid: Grid, machine: dict[str, Any]) -> Record:
  settings = grid.config.eval
  return {
    "max_new_tokens": settings.max_new_tokens,
    "batch_size": settings.batch_size,
    "repeats": settings.repeats,
    "decode": dataclasses.asdict(grid.config.decode),
    "cpu": machine["cpu"],
    "device": machine["device"],
    "prompts": {
      each.name: {"count": len(each.prompts), "digest": each.digest}
      for each in grid.prompt_sets
    },
  }


def check_judging(results: Results, judged: Record) -> None:
  """Raises FileError unless earlier replies can stand beside new ones."""
  if results.grid is None or not results.of_kind("reply"):
    return
  earlier = results.grid["judged"]
  changes = [
    f"{name} {earlier.get(name)!r}, not {value!r}"
    for name, value in judged.items()
    if name != "prompts" and earlier.get(name) != value
  ]
  changes += [
    f"other prompts in {name}"
    for name, value in judged["prompts"].items()
    if earlier["prompts"].get(name, value) != value
  ]
  if changes:
    raise FileError(
      f"{results.path} holds replies decoded with {'; '.join(changes)}; delete "
      "it to judge all drafters anew (nothing is trained again), or choose "
      "another --workdir"
    )


def describe_trial(trial: Trial) -> Record:
  """The record of a trained run, out of its metrics."""
  text = (trial.workdir / "metrics.jsonl").read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  walked = [line for line in lines if line["kind"] == "held_out"]
  paced = [
    line["slots"] / line["slots_per_s"]
    for line in lines
    if line["kind"] == "train" and line.get("slots_per_s")
  ]
  return {
    "kind": "trial",
    "arm": trial.arm.name,
    "seed": trial.seed,
    "steps": walked[-1]["step"],
    "tau": walked[-1]["tau"],
    "step_seconds": statistics.median(paced) if paced else None,
    "curve": [[line["step"], round(line["tau"], 4)] for line in walked],
  }


def describe_missing(grid: Grid, results: Results) -> list[Record]:
  """Records of complete runs that the results say nothing of."""
  known = {(r["arm"], r["seed"]) for r in results.of_kind("trial")}
  return [
    describe_trial(trial)
    for trial in grid.trials
    if trial.seed is not None
    and trial.is_complete
    and (trial.arm.name, trial.seed) not in known
  ]
