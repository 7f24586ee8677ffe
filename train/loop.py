"""The training loop, read downwards: set up, step, log, evaluate, keep."""

import json
import math
import pathlib
import time

import jax
import numpy as np
import tqdm
from absl import logging

from dflash_jax.config import Config, to_json
from train.checkpoint import Checkpoints, read_record, write_record
from train.setup import Setup
from train.step import TrainState, fold_tap_scale
from train.walk import Walk, walk

EVALUATION_BATCH = 4  # held-out sequences per call, all anchors at once


class TrainingDiverged(RuntimeError):
  """A loss, gradient or update stopped being finite."""


def train(config: Config, workdir: str, resume: bool = False) -> Walk:
  """Trains a drafter.

  Args:
    config: of the run; written to workdir/config.json.
    workdir: gets config.json, metrics.jsonl, draft_vocabulary.json and
      checkpoints/.
    resume: continue from the newest checkpoint, bit for bit as if the run had
      not stopped.

  Returns:
    The walk of the held-out answers at the end.
  """
  # --- Set up -----------------------------------------------------------------
  settings = config.train
  setup = Setup.create(config)
  trainer = setup.trainer
  logging.info(
    "drafter: %d parameters; corpus: %d training and %d held-out sequences",
    trainer.drafter.count_parameters(),
    len(setup.corpus.train),
    len(setup.corpus.held_out),
  )
  checkpoints = Checkpoints(workdir, settings.keep_checkpoints)
  state = trainer.init_state(jax.random.key(settings.seed), setup.tap_scale())
  if resume:
    state = checkpoints.restore(state)
  else:
    _refuse_overwriting(checkpoints, workdir)
    write_record(workdir, "config.json", to_json(config))
    if setup.head_ids is not None:
      ids = json.dumps(setup.head_ids.tolist())
      write_record(workdir, "draft_vocabulary.json", ids)
  first = int(state.step)
  log = MetricsLog(workdir, first)

  # --- Step -------------------------------------------------------------------
  pending: list[dict[str, jax.Array]] = []
  clock = time.perf_counter()
  bar = tqdm.tqdm(total=settings.steps, initial=first, desc="train")
  result = None
  for step in range(first, settings.steps):
    batch = setup.train_batch(step)
    state, metrics = trainer.update(
      state, setup.target_params, setup.borrowed, batch
    )
    pending.append(metrics)
    done = step + 1
    is_last = done == settings.steps

    # --- Log ------------------------------------------------------------------
    if done % settings.log_every == 0 or is_last:
      record = _average(jax.device_get(pending), done)
      seconds = time.perf_counter() - clock
      record["slots_per_s"] = record["slots"] * len(pending) / seconds
      log.write("train", done, record)
      bar.set_postfix_str(
        f"loss {record['loss']:.3f} tau~{record['anchor_tau']:.2f}"
      )
      bar.update(len(pending))
      pending, clock = [], time.perf_counter()

    # --- Evaluate and keep ----------------------------------------------------
    evaluates = done % settings.evaluate_every == 0 or is_last
    if evaluates or done % settings.checkpoint_every == 0:
      result, record = evaluate(setup, state)
      log.write("held_out", done, record)
      bar.write(f"step {done}: held-out tau {result.tau:.3f} (walked)")
      checkpoints.save(state, result.tau)
      clock = time.perf_counter()
  bar.close()
  checkpoints.close()
  if result is None:
    result, _ = evaluate(setup, state)
  return result


def evaluate(
  setup: Setup, state: TrainState
) -> tuple[Walk, dict[str, float | list[float]]]:
  """Walks the held-out answers."""
  trainer = setup.trainer
  indices = setup.corpus.held_out[: trainer.config.evaluate_sequences]
  if not indices.size:
    indices = setup.corpus.train[: trainer.config.evaluate_sequences]
    logging.warning("no held-out sequences: evaluating on training ones")
  params = fold_tap_scale(state.params, state.tap_scale)
  right, masks, losses, weights = [], [], 0.0, 0.0
  for start in range(0, len(indices), EVALUATION_BATCH):
    part = np.resize(indices[start : start + EVALUATION_BATCH], EVALUATION_BATCH)
    kept = len(indices[start : start + EVALUATION_BATCH])
    batch = setup.batch(part)
    matches, sums = trainer.matches(
      params, setup.target_params, setup.borrowed, batch
    )
    right.append(np.asarray(matches)[:kept])
    masks.append(batch.loss_mask[:kept])
    losses += float(sums.loss)
    weights += float(sums.weight)
  result = walk(np.concatenate(right), np.concatenate(masks))
  return result, {
    "loss": losses / max(weights, 1e-6),
    "tau": result.tau,
    "tau_per_answer": result.tau_per_answer,
    "acceptance": result.acceptance.tolist(),
    "rounds": result.rounds,
  }


class MetricsLog:
  """metrics.jsonl: one JSON object a line, never ahead of the checkpoint.

  Resuming drops the lines past the restored step, so that the file reads as
  one run.
  """

  def __init__(self, workdir: str, step: int):
    """Opens workdir/metrics.jsonl, keeping what happened up to `step`."""
    self._path = pathlib.Path(workdir) / "metrics.jsonl"
    lines = self._path.read_text().splitlines() if self._path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    write_record(
      workdir, "metrics.jsonl", "".join(f"{line}\n" for line in kept)
    )

  def write(self, kind: str, step: int, values: dict) -> None:
    """Appends a record."""
    record = {"kind": kind, "step": step, **values}
    with self._path.open("a") as file:
      file.write(json.dumps(record) + "\n")


def _average(metrics: list[dict[str, np.ndarray]], step: int) -> dict:
  """Means over the steps since the last log; refuses what is not finite."""
  first = step - len(metrics) + 1
  for offset, values in enumerate(metrics):
    for name in ("loss", "gradient_norm", "update_norm"):
      if not math.isfinite(values[name]):
        raise TrainingDiverged(
          f"{name} is {values[name]} at step {first + offset}; lower "
          "train.learning_rate or resume from an earlier checkpoint"
        )
  return {
    name: np.mean([values[name] for values in metrics], axis=0).tolist()
    for name in metrics[0]
  }


def _refuse_overwriting(checkpoints: Checkpoints, workdir: str) -> None:
  if checkpoints.latest_step is not None:
    raise FileExistsError(
      f"{workdir} holds a run at step {checkpoints.latest_step}; continue it "
      "with --resume or choose another --workdir"
    )


def load_record(workdir: str) -> dict:
  """The config of a finished or running run, as plain JSON."""
  return read_record(workdir, "config.json")
