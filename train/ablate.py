"""Trains drafters that differ by one thing each, and says what it changed.

    python -m train.ablate --config=configs/ablation.py --jobs=2

Trains every arm of config.ablation with every seed, decodes the same prompts
with all of them, and writes the report. Killed, it goes on where it was when
started again: what is trained is not trained twice, what is half trained is
resumed, what has been decoded is not decoded again. --report_only makes the
report anew of what there is.
"""

import os
import pathlib
import shlex
import shutil
import signal
import sys
from typing import Any

import tqdm
from absl import flags
from ml_collections import config_flags

from dflash_jax import command, config_file
from dflash_jax.config import Config, ConfigError
from eval.plots import check_plot
from train.ablation import jobs as jobs_lib
from train.ablation.describe import (
  describe_grid,
  describe_missing,
  describe_trial,
)
from train.ablation.grid import Grid, Trial
from train.ablation.judge import judge
from train.ablation.prepare import (
  build_features,
  check_arms,
  claim,
  load_base,
)
from train.ablation.report import write_report
from train.ablation.results import Results
from train.checkpoint import Checkpoints, quieten_orbax
from train.export import export
from train.files import FileError


def define_flags() -> None:
  """The flags of python -m train.ablate, besides --config."""
  flags.DEFINE_string(
    "workdir", None, "Directory of all runs. Default: runs/NAME of the config."
  )
  flags.DEFINE_string(
    "report",
    None,
    "Markdown file; its plots go beside it. Default: docs/results/NAME.md.",
  )
  flags.DEFINE_integer(
    "jobs", 1, "Runs trained at a time; the cores are shared out among them."
  )
  flags.DEFINE_bool(
    "skip_training", False, "Judge what is trained, and train nothing."
  )
  flags.DEFINE_bool(
    "report_only", False, "Write the report of the results there are."
  )


def main(config: Config) -> None:
  """Entry point of python -m train.ablate."""
  values = flags.FLAGS
  name = config.name or "ablation"
  workdir = pathlib.Path(values.workdir or f"runs/{name}")
  report = pathlib.Path(values.report or f"docs/results/{name}.md")
  if values.jobs < 1:
    raise ConfigError(f"--jobs={values.jobs} is impossible; use at least 1")
  if report.suffix != ".md":
    raise ConfigError(f"--report={report} must end in .md")
  check_plot(str(report.with_suffix("") / "tau.png"))
  if values.report_only:
    write_report(Results(workdir), report)
    print(report)
    return
  # Runs share the device with this process, which must not take all of it, and
  # compiled code with each other.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  cache = str(workdir.absolute() / ".compiled")
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends runs, too
  quieten_orbax()
  grid = Grid.plan(config, workdir)
  with jobs_lib.locked(workdir) as lock:
    base = load_base(grid)
    parameters = check_arms(grid, base)
    claim(grid, workdir)
    results = Results(workdir)
    grid_record = describe_grid(grid, parameters, results, _command())
    results.add([grid_record, *describe_missing(grid, results)])
    if not values.skip_training:
      build_features(grid, base)
    del base  # the device's memory is for the runs
    if not values.skip_training:
      train_all(grid, results, lock, values.jobs)
    judge(grid, results)
  write_report(results, report)
  print(report)
  failed = [trial.name for trial in grid.trials if not trial.is_complete]
  if failed and not values.skip_training:
    raise FileError(
      f"{len(failed)} of {len(grid.trials)} runs failed ({'; '.join(failed)}); "
      f"see log.txt of each below {workdir}, then run the same command again"
    )


def train_all(grid: Grid, results: Results, lock: int, at_once: int) -> None:
  """Trains and exports what is not, in the grid's order."""
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  given = config_file.read(path)
  trials: dict[pathlib.Path, Trial] = {}
  waiting = []
  for trial in grid.trials:
    if trial.is_complete:
      continue
    step = _latest_step(trial)
    if step == trial.config.train.steps:  # trained, but killed before export
      _finish(trial, results)
      continue
    trials[trial.workdir] = trial
    waiting.append(
      jobs_lib.Job(
        jobs_lib.train_command(
          path, given, trial.config, trial.workdir, resume=step is not None
        ),
        trial.workdir,
      )
    )
  with tqdm.tqdm(total=len(waiting), desc="runs", disable=None) as bar:

    def on_end(job: jobs_lib.Job, status: int) -> None:
      trial = trials[job.workdir]
      if status == 0:
        _finish(trial, results)
      else:
        why = job.last_words
        failure: dict[str, Any] = {"kind": "failure", "arm": trial.arm.name}
        results.add([failure | {"seed": trial.seed, "why": why}])
        bar.write(f"{trial.name} failed: {why}", file=sys.stderr)
      bar.update()

    jobs_lib.run_all(waiting, at_once, lock, on_end)


def _latest_step(trial: Trial) -> int | None:
  """Step of a run's newest checkpoint, None before the first."""
  if not (trial.workdir / "checkpoints").is_dir():
    return None
  checkpoints = Checkpoints(trial.workdir, keep=1, read_only=True)
  step = checkpoints.latest_step
  checkpoints.close()
  return step


def _finish(trial: Trial, results: Results) -> None:
  """Exports a run's last step, whatever its tau: all trained equally long.

  Its checkpoints go then, for a grid has many.
  """
  results.add([describe_trial(trial)])
  export(str(trial.workdir), str(trial.drafter), step="latest")
  shutil.rmtree(trial.workdir / "checkpoints", ignore_errors=True)


def _command() -> str:
  """This command, as a person would type it."""

  def quote(argument: str) -> str:
    if "'" in argument and not set(argument) & set('"$`\\!'):
      return f'"{argument}"'
    return shlex.quote(argument)

  return " ".join(["python -m train.ablate", *map(quote, sys.argv[1:])])


if __name__ == "__main__":
  command.run(main, define_flags, errors=(FileError,))
