"""python -m train.ablate: a whole grid, killed on its way and run again."""

import contextlib
import json
import pathlib
import time

import numpy as np
import pytest

from tests.train.programs import failed_clearly, run
from train.ablation.jobs import locked
from train.ablation.results import Results
from train.feature_cache import FeatureCache
from train.files import FileError

CONFIG = """
import dataclasses
from configs import tiny
from dflash_jax.config import AblationConfig, EvalConfig

def get_config():
  config = tiny.get_config()
  train = dataclasses.replace(
    config.train, corpus=({corpus!r},), steps=4, sequence_length=48,
    feature_cache={features!r}, evaluate_every=100, checkpoint_every=100,
    log_every=2,
  )
  return dataclasses.replace(
    config,
    name="grid",
    train=train,
    eval=EvalConfig(limit=2, max_new_tokens=9, sweep=("width=fixed:3",)),
    ablation=AblationConfig(
      arms=(
        "base:",
        "taught: 'train.loss=0.5*ce + 0.5*kl' drafter.taps=(2,)",
        "ngram: drafter.path=ngram",
      ),
      seeds=(0, 1),
      prompts=({prompts!r},),
    ),
  )
"""


@pytest.fixture
def config(tmp_path, corpus_directory) -> pathlib.Path:
  """A config file of two trained arms and one that needs none."""
  prompts = tmp_path / "few.jsonl"
  prompts.write_text('{"prompt": "abab"}\n{"prompt": "cdcd"}\n')
  path = tmp_path / "grid.py"
  path.write_text(
    CONFIG.format(
      corpus=corpus_directory,
      features=str(tmp_path / "features"),
      prompts=str(prompts),
    )
  )
  return path


def command(config: pathlib.Path, *more: str) -> list[str]:
  workdir, report = config.parent / "work", config.parent / "report.md"
  flags = [f"--config={config}", f"--workdir={workdir}", f"--report={report}"]
  return [*flags, *more]


def wait_for_the_run_left_behind(workdir: pathlib.Path) -> None:
  """A killed grid's current run goes on, and holds the directory."""
  while True:
    with contextlib.suppress(FileError), locked(workdir):
      return
    time.sleep(0.2)


def test_a_grid_is_trained_judged_and_reported(config, compiled):
  smaller = "--config.ablation.arms=('base:','ngram: drafter.path=ngram')"
  result = run(
    "train.ablate",
    *command(config, smaller, "--config.ablation.seeds=(7,)"),
    cache=compiled,
  )
  assert result.returncode == 0, result.stderr
  check_whole(config.parent, arms=("base",), seeds=(7,))


def check_whole(
  directory: pathlib.Path, arms: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
  """Every arm was trained with every seed, judged on everything, reported."""
  results = Results(directory / "work")
  trials = [(r["arm"], r["seed"]) for r in results.of_kind("trial")]
  assert {*trials} == {(arm, seed) for arm in arms for seed in seeds}
  replies = [
    (r["arm"], r["seed"], r["place"]) for r in results.of_kind("reply")
  ]
  who = [*dict.fromkeys(trials), ("ngram", None)]
  expected = [(*one, place) for one in who for place in (0, 1)]
  assert sorted(map(str, replies)) == sorted(map(str, expected))
  assert all(r["identical"] for r in results.of_kind("reply"))
  for arm, seed in trials:
    workdir = directory / "work" / arm / f"seed{seed}"
    assert (workdir / "drafter").is_dir()
    assert not (workdir / "checkpoints").exists()
    log = (workdir / "log.txt").read_text()
    assert log.count("held-out tau") == 1  # not trained twice
  text = (directory / "report.md").read_text()
  others = {*arms, "ngram"} - {"base"}
  assert all(f"| {other} vs base |" in text for other in others)


@pytest.mark.slow
def test_a_grid_killed_and_run_again_is_whole(config, compiled):
  workdir = config.parent / "work"

  # Lines are written of the grid, then of each run before its export.
  place = ("train.ablation.results:Results.add", 3)
  killed = run("train.ablate", *command(config), cache=compiled, kill_at=place)
  assert killed.returncode == -9
  assert (workdir / "base" / "seed0" / "drafter").is_dir()
  assert not (workdir / "base" / "seed0" / "checkpoints").exists()
  assert not (workdir / "taught" / "seed0" / "drafter").exists()
  wait_for_the_run_left_behind(workdir)

  resumed = run("train.ablate", *command(config, "--jobs=2"), cache=compiled)
  assert resumed.returncode == 0, resumed.stderr
  check_whole(config.parent, arms=("base", "taught"), seeds=(0, 1))
  # Both arms read one cache, which holds what either needs.
  meta = json.loads((config.parent / "features" / "meta.json").read_text())
  assert meta["taps"] == [1, 2, 4]


def test_an_impossible_arm_is_refused_before_any_training(config, compiled):
  lines = "('base:','x: drafter.taps=(77,)')"
  result = run(
    "train.ablate",
    *command(config, f"--config.ablation.arms={lines}"),
    cache=compiled,
  )
  line = failed_clearly(result)
  assert "arm 'x': tap 77 is outside" in line
  assert not (config.parent / "work" / "base").exists()


# --- Features that arms share -------------------------------------------------


def test_a_cache_is_read_in_part_and_never_beyond(setup, tmp_path):
  target, params = setup.trainer.target, setup.target_params
  width = target.config.width

  def open_cache(*taps: int) -> FeatureCache:
    size = len(taps) * width
    source = {"target": "tests"}
    return FeatureCache(str(tmp_path), setup.corpus, taps, size, source)

  open_cache(0, 2).build(target, params)
  index, length = np.array([2, 9]), 11
  whole = open_cache(0, 2).batch(index, length)
  for taps in ((2,), (2, 0), (0, 2)):
    part = open_cache(*taps)
    assert part.is_complete
    columns = [(0, 2).index(tap) for tap in taps]
    parts = [whole[..., c * width : (c + 1) * width] for c in columns]
    expected = np.concatenate(parts, axis=-1)
    np.testing.assert_array_equal(part.batch(index, length), expected)
  with pytest.raises(FileError, match=r"taps \[0, 2\], now \[0, 1\]"):
    open_cache(0, 1)
