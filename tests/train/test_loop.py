"""Whole runs: killed, full, resumed, diverged, refused."""

import dataclasses
import json
import logging
import pathlib
import re

import jax
import numpy as np
import pytest

from configs.tiny import get_config
from dflash_jax.config import Config, ConfigError
from tests.train.programs import failed_clearly, run
from train import loop
from train.checkpoint import Checkpoints
from train.files import FileError
from train.loop import TrainingDiverged, train
from train.record import MetricsLog, read_config, read_run
from train.setup import Setup
from train.step import Trainer

STEPS, KEEP_EVERY, LOG_EVERY, DECODE_EVERY = 60, 20, 7, 30
PACE = ("slots_per_s", "flops_per_s")


def command(corpus: str, workdir: pathlib.Path, *more: str) -> list[str]:
  return [
    "--config=configs/tiny.py",
    f"--config.train.corpus=('{corpus}',)",
    f"--config.train.steps={STEPS}",
    f"--config.train.checkpoint_every={KEEP_EVERY}",
    "--config.train.evaluate_every=1000",
    f"--config.train.log_every={LOG_EVERY}",
    f"--config.train.decode_every={DECODE_EVERY}",
    "--config.train.decode_prompts=2",
    "--config.train.decode_tokens=11",
    "--config.train.sequence_length=48",
    f"--workdir={workdir}",
    *more,
  ]


def metrics(workdir: pathlib.Path) -> list[dict]:
  """Everything that was logged but the time it took."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  records = [json.loads(line) for line in lines]
  for record in records:
    for name in PACE:
      record.pop(name, None)
  return records


@pytest.fixture(scope="module")
def workdir(corpus_directory, compiled, tmp_path_factory) -> pathlib.Path:
  """An uninterrupted run."""
  path = tmp_path_factory.mktemp("whole")
  result = run("train.main", *command(corpus_directory, path), cache=compiled)
  assert result.returncode == 0, result.stderr
  assert "orbax" not in result.stderr and "Checkpoint" not in result.stderr
  assert "donated" not in result.stderr  # XLA's complaint of buffers unused
  assert "slots/s" in result.stderr
  return path


def final_state(workdir: pathlib.Path):
  """The last checkpoint, bit for bit."""
  checkpoints = Checkpoints(workdir, keep=2, read_only=True)
  config = read_config(workdir)
  trainer = Setup.create(config).trainer
  like = trainer.init_state(jax.random.key(0), np.zeros(2 * 64))
  return checkpoints.taus, checkpoints.restore(like)


def test_killed_full_and_resumed_is_the_uninterrupted_run(
  workdir, corpus_directory, compiled, tmp_path
):
  arguments = command(corpus_directory, tmp_path)

  # Lines are written of steps 7, 14, 20, 20 (held out), 21 and 28.
  place = ("train.record:MetricsLog.write", 6)
  killed = run("train.main", *arguments, cache=compiled, kill_at=place)
  assert killed.returncode == -9
  assert metrics(tmp_path)[-1]["step"] == 21

  full = run(
    "train.main", *arguments, "--resume", cache=compiled, file_limit=200_000
  )
  line = failed_clearly(full)
  assert f"cannot write checkpoint {2 * KEEP_EVERY}" in line
  assert "--resume" in line

  resumed = run("train.main", *arguments, "--resume", cache=compiled)
  assert resumed.returncode == 0, resumed.stderr
  assert metrics(tmp_path) == metrics(workdir)
  # The bar goes on from the checkpoint, and knows when it will be done.
  assert re.search(r"\| [2-5]\d/60 \[\d\d:\d\d<\d\d:\d\d", resumed.stderr)
  taus, state = final_state(tmp_path)
  expected_taus, expected = final_state(workdir)
  assert int(state.step) == STEPS
  assert taus == expected_taus
  jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_metrics_say_what_happened(workdir):
  records = metrics(workdir)
  trained = [r for r in records if r["kind"] == "train"]
  walked = [r for r in records if r["kind"] == "held_out"]
  assert [r["step"] for r in trained] == sorted(
    {*range(LOG_EVERY, STEPS, LOG_EVERY), *range(20, STEPS + 1, KEEP_EVERY)}
  )
  assert [r["step"] for r in walked] == [20, 40, 60]
  decoded = [r for r in records if r["kind"] == "decode"]
  assert [r["step"] for r in decoded] == [30, 60]
  assert decoded[0]["tokens"] == 2 * 11 and decoded[0]["tau"] >= 1
  assert set(decoded[0]) >= {"text", "acceptance"}
  assert set(trained[0]) >= {
    "loss",
    "accuracy",
    "anchor_tau",
    "slots",
    "gradient_norm",
    "update_norm",
  }
  assert len(trained[0]["accuracy"]) == 3
  assert set(walked[0]) >= {"tau", "tau_per_answer", "acceptance", "loss"}


def test_every_line_tells_the_pace(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  trained = [r for r in map(json.loads, lines) if r["kind"] == "train"]
  assert all(set(r) >= set(PACE) and r["slots_per_s"] > 0 for r in trained)
  ratios = [r["flops_per_s"] * r["slots"] / r["slots_per_s"] for r in trained]
  assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_batches_made_ahead_change_nothing_and_the_state_is_given_away(
  workdir, corpus_directory, tmp_path, monkeypatch
):
  def one_by_one(make, steps):
    yield from map(make, steps)

  update, given = Trainer.update, []

  def watched(self, state, *arguments):
    result = update(self, state, *arguments)
    leaves = jax.tree.leaves(state.params)
    given.append(all(leaf.is_deleted() for leaf in leaves))
    return result

  monkeypatch.setattr(loop, "prefetch", one_by_one)
  monkeypatch.setattr(Trainer, "update", watched)
  config = configured(corpus_directory, decode_every=DECODE_EVERY)
  train(config, str(tmp_path))
  assert metrics(tmp_path) == metrics(workdir)
  assert all(given[:KEEP_EVERY])  # a checkpoint may hold on to the state


def test_the_config_and_what_it_came_to_are_written_beside(
  workdir, corpus_directory
):
  config = read_config(workdir)
  assert config.train.steps == STEPS
  assert config.train.corpus == (corpus_directory,)
  assert config.target == get_config().target
  drafter = read_run(workdir).drafter
  assert drafter.block_size == 4 and drafter.target_layer_ids == (1, 2)


# --- Refusals, before anything is compiled ------------------------------------


def configured(corpus_directory, **overrides) -> Config:
  """The config that `command` describes."""
  config = get_config()
  settings = {
    "corpus": (corpus_directory,),
    "steps": STEPS,
    "checkpoint_every": KEEP_EVERY,
    "evaluate_every": 1000,
    "log_every": LOG_EVERY,
    "sequence_length": 48,
    "decode_prompts": 2,
    "decode_tokens": 11,
  }
  config.train = dataclasses.replace(config.train, **settings | overrides)
  return config


def test_a_finished_run_can_be_resumed_and_says_the_same(
  workdir, corpus_directory
):
  before = metrics(workdir)
  walk = train(configured(corpus_directory), str(workdir), resume=True)
  assert metrics(workdir) == before
  assert walk.tau == before[-1]["tau"]


def test_a_run_is_not_overwritten(workdir, corpus_directory):
  with pytest.raises(FileError, match=r"run at step 60; continue .*--resume"):
    train(configured(corpus_directory), str(workdir))


def test_resuming_needs_a_checkpoint(corpus_directory, tmp_path):
  config = configured(corpus_directory)
  with pytest.raises(FileError, match=r"config\.json is missing; .*--workdir"):
    train(config, str(tmp_path / "nowhere"), resume=True)
  assert not (tmp_path / "nowhere").exists()


def test_resuming_before_the_first_checkpoint_is_refused(
  workdir, corpus_directory, tmp_path
):
  for name in ("config.json", "run.json"):
    (tmp_path / name).write_bytes((workdir / name).read_bytes())
  with pytest.raises(FileError, match="no checkpoint yet; start without --res"):
    train(configured(corpus_directory), str(tmp_path), resume=True)


@pytest.mark.parametrize(
  ("section", "name", "value"),
  [
    ("train", "learning_rate", 1e-3),
    ("train", "steps", STEPS + 1),
    ("drafter", "num_layers", 3),
    ("target", "seed", 1),
  ],
)
def test_resuming_with_another_config_names_the_field(
  workdir, corpus_directory, section, name, value
):
  config = configured(corpus_directory)
  setattr(getattr(config, section), name, value)
  with pytest.raises(FileError, match=rf"{section}\.{name}=.*, not {value}"):
    train(config, str(workdir), resume=True)


def test_resuming_with_another_config_names_every_field(
  workdir, corpus_directory
):
  config = configured(corpus_directory, learning_rate=1e-3, log_every=3)
  config.drafter.num_layers = 3
  with pytest.raises(FileError) as caught:
    train(config, str(workdir), resume=True)
  message = str(caught.value)
  assert "drafter.num_layers=2, not 3; train.learning_rate=" in message
  assert "log_every" not in message


def test_resuming_on_another_corpus_is_refused(
  workdir, corpus_directory, tmp_path
):
  config = configured(corpus_directory)
  record = json.loads((workdir / "run.json").read_text())
  for path in workdir.rglob("*"):
    copy = tmp_path / path.relative_to(workdir)
    if path.is_dir():
      copy.mkdir()
    else:
      copy.write_bytes(path.read_bytes())
  (tmp_path / "run.json").write_text(json.dumps(record | {"corpus": "0"}))
  with pytest.raises(FileError, match="begun on another corpus"):
    train(config, str(tmp_path), resume=True)


@pytest.mark.parametrize(
  ("section", "name", "value", "message"),
  [
    ("train", "steps", 0, "train.steps=0"),
    ("train", "batch_size", 0, "train.batch_size=0"),
    ("train", "log_every", 0, "train.log_every=0"),
    ("train", "loss", "mse", "train.loss='mse'.*'mse' is unknown"),
    ("train", "loss", "ce + confidence", "drafter has none; leave the term"),
    ("train", "curriculum", 0.5, "curriculum=0.5 moves from plain"),
    ("train", "curriculum", 1.5, "curriculum=1.5"),
    (
      "train",
      "slot_weights",
      "late",
      "'late' .* 'uniform', 'decay' or 'dpace'",
    ),
    ("train", "selector_misses", "keep", "choose 'drop' or 'overwrite'"),
    ("train", "optimizer", "sgd", "optimizer='sgd'.*'adamw' or 'muon'"),
    ("train", "schedule", "step", "choose 'cosine', 'linear' or 'constant'"),
    ("train", "ema", 1.0, "train.ema=1.0"),
    ("train", "packing", -1, "train.packing=-1"),
    ("train", "learning_rate", float("inf"), "learning_rate=inf"),
    ("train", "num_anchors", 99, "num_anchors=99 exceeds .*; lower num_anch"),
    ("train", "hybrid_features", True, "name a directory in train.feature_ca"),
    ("train", "decode_every", -1, "train.decode_every=-1"),
    ("train", "decode_tokens", 0, "train.decode_tokens=0"),
    ("train", "trackers", ("mlflow",), "'mlflow' is unknown"),
    ("train", "accumulate", 3, "accumulate=3 .* divide train.batch_size=4"),
    ("train", "compute_dtype", "int8", "compute_dtype='int8'"),
    ("train", "warmup", 1.0, "train.warmup=1.0"),
    ("train", "beta2", 1.0, "train.beta2=1.0"),
    ("train", "dpace_alpha", float("nan"), "dpace_alpha=nan"),
    ("drafter", "taps", (1, 5), "tap 5 is outside .* 0...4"),
    ("drafter", "num_taps", 4, "num_taps=4"),
    ("drafter", "mask_token_id", 259, "mask_token_id=259 is outside .* 259"),
    ("drafter", "block_size", 1, "block_size=1 drafts nothing"),
    ("drafter", "name", "medusa", "'medusa' cannot be trained"),
    ("drafter", "name", "eagle3", "num_layers=2, and eagle3 has one layer"),
    ("drafter", "name", "lm", "'dpace' weighs .* use 'uniform'"),
    ("train", "unroll_steps", 0, "train.unroll_steps=0"),
    ("drafter", "name", "dspark", "confidence would never learn"),
    ("drafter", "name", "dflash2", "selector would never learn"),
    ("drafter", "draft_vocabulary", 260, "draft_vocabulary=260 exceeds"),
    ("drafter", "layer_windows", (3,), "layer_windows has 1 entries"),
  ],
)
def test_settings_that_cannot_be_are_named(
  corpus_directory, tmp_path, section, name, value, message
):
  config = configured(corpus_directory)
  setattr(getattr(config, section), name, value)
  with pytest.raises(ConfigError, match=message):
    train(config, str(tmp_path))


def test_the_program_refuses_in_one_line(compiled, tmp_path):
  missing = tmp_path / "nowhere"
  arguments = command(str(missing), tmp_path)
  line = failed_clearly(run("train.main", *arguments, cache=compiled))
  assert f"{missing} holds no corpus" in line


def test_a_corpus_of_another_target_is_told(corpus_directory, caplog):
  with caplog.at_level(logging.WARNING):
    Setup.create(configured(corpus_directory))
  assert "expect a lower tau" in caplog.text


# --- Divergence ---------------------------------------------------------------


def test_a_value_that_is_not_finite_stops_the_run_at_its_step(
  corpus_directory, tmp_path, monkeypatch
):
  update = Trainer.update

  def poisoned(self, state, target_params, borrowed, batch):
    if int(state.step) == 10:
      borrowed = jax.tree.map(lambda leaf: leaf * np.nan, borrowed)
    return update(self, state, target_params, borrowed, batch)

  monkeypatch.setattr(Trainer, "update", poisoned)
  config = configured(corpus_directory, log_every=4)
  with pytest.raises(TrainingDiverged, match="loss is nan at step 11; lower"):
    train(config, str(tmp_path))
  assert [record["step"] for record in metrics(tmp_path)] == [4, 8]
  assert Checkpoints(tmp_path, keep=2).latest_step is None


# --- Metrics ------------------------------------------------------------------


def test_lines_past_the_checkpoint_and_torn_ones_are_dropped(tmp_path):
  log = MetricsLog(str(tmp_path), 0)
  for step in (1, 2, 3):
    log.write("train", step, {"loss": step / 3})
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "st')
  log = MetricsLog(str(tmp_path), 2)
  log.write("train", 3, {"loss": 0.5})
  assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3]
  assert metrics(tmp_path)[-1]["loss"] == 0.5


def test_a_full_disk_under_the_metrics_is_named(tmp_path, small_files):
  log = MetricsLog(str(tmp_path), 0)
  with small_files(10), pytest.raises(FileError, match="cannot write .*jsonl"):
    log.write("train", 1, {"loss": 0.5})
  assert metrics(tmp_path) == []
