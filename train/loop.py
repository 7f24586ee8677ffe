"""The training loop, read downwards: set up, step, log, evaluate, keep."""

import time
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging

from dflash_jax.config import Config
from train.checkpoint import CheckpointError, Checkpoints
from train.record import (
  MetricsLog,
  Run,
  check_same_config,
  check_same_run,
  write_run,
)
from train.settings import check_settings
from train.setup import Setup
from train.state import TrainState
from train.sums import SlotSums, summarize
from train.walk import Walk, walk

INIT_STREAM = 2**31  # noise of the first weights; steps draw from 0, 1, ...
EVALUATION_BATCH = 4  # held-out sequences per call, all anchors at once


class TrainingDiverged(RuntimeError):
  """A loss, gradient or update stopped being finite."""


def train(config: Config, workdir: str, resume: bool = False) -> Walk:
  """Trains a drafter.

  Args:
    config: of the run.
    workdir: gets the files of train/record.py, and checkpoints/.
    resume: continue from the newest checkpoint, bit for bit as if the run had
      not stopped.

  Returns:
    The walk of the held-out answers at the end.

  Raises:
    ConfigError: settings nobody could train with.
    FileError: a workdir, corpus or disk that refuses.
    TrainingDiverged: a value is no longer finite, at the step it names.
  """
  # --- Set up -----------------------------------------------------------------
  settings = config.train
  checkpoints = _open_checkpoints(config, workdir, resume)
  setup = Setup.create(config)
  trainer = setup.trainer
  ids = None if setup.head_ids is None else tuple(setup.head_ids.tolist())
  run = Run(setup.corpus.checksum, trainer.drafter.config, ids)
  key = jax.random.fold_in(jax.random.key(settings.seed), INIT_STREAM)
  columns = None if ids is None else len(ids)
  state = trainer.init_state(key, setup.tap_scale(), columns)
  if resume:
    check_same_run(workdir, run)
    state = checkpoints.restore(state)
  else:
    write_run(workdir, config, run)
  first = int(state.step)
  log = MetricsLog(workdir, first)
  logging.info(
    "drafter: %d parameters; corpus: %d training and %d held-out sequences",
    trainer.drafter.count_parameters(),
    len(setup.corpus.train),
    len(setup.corpus.held_out),
  )

  # --- Step -------------------------------------------------------------------
  result = None
  pending: list[tuple[SlotSums, dict[str, jax.Array]]] = []
  clock = time.perf_counter()
  with tqdm.tqdm(total=settings.steps, initial=first, desc="train") as bar:
    for step in range(first, settings.steps):
      batch = setup.train_batch(step)
      state, sums, norms = trainer.update(
        state, setup.target_params, setup.borrowed, batch
      )
      pending.append((sums, norms))
      done = step + 1
      keeps = (
        done % settings.evaluate_every == 0
        or done % settings.checkpoint_every == 0
        or done == settings.steps
      )

      # --- Log ----------------------------------------------------------------
      # At checkpoints too, so that a resumed run writes the same lines.
      if keeps or done % settings.log_every == 0:
        record = _summarize(jax.device_get(pending), done)
        seconds = time.perf_counter() - clock
        record["slots_per_s"] = record["slots"] * len(pending) / seconds
        log.write("train", done, record)
        bar.set_postfix_str(
          f"loss {record['loss']:.3f} tau~{record['anchor_tau']:.2f} "
          f"{record['slots_per_s']:.0f} slots/s"
        )
        bar.update(len(pending))
        pending, clock = [], time.perf_counter()

      # --- Evaluate and keep --------------------------------------------------
      if keeps:
        result, record = evaluate(setup, state)
        log.write("held_out", done, record)
        bar.write(f"step {done}: held-out tau {result.tau:.3f} (walked)")
        checkpoints.save(state, result.tau)
        clock = time.perf_counter()
  checkpoints.close()
  return result or evaluate(setup, state)[0]


def evaluate(setup: Setup, state: TrainState) -> tuple[Walk, dict[str, Any]]:
  """Walks the held-out answers; also what metrics.jsonl says of them."""
  params = state.drafter
  right, masks, sums = [], [], []
  for start in range(0, len(setup.evaluation), EVALUATION_BATCH):
    part = setup.evaluation[start : start + EVALUATION_BATCH]
    batch = setup.batch(part, rows=EVALUATION_BATCH)
    matches, part_sums = setup.trainer.matches(
      params, setup.target_params, setup.borrowed, batch
    )
    right.append(np.asarray(matches))
    masks.append(np.asarray(batch.loss_mask))
    sums.append(jax.device_get(part_sums))
  result = walk(np.concatenate(right), np.concatenate(masks))
  return result, _as_lists(summarize(_add(sums))) | {
    "tau": result.tau,
    "tau_per_answer": result.tau_per_answer,
    "acceptance": result.acceptance.tolist(),
    "rounds": result.rounds,
  }


def _open_checkpoints(
  config: Config, workdir: str, resume: bool
) -> Checkpoints:
  """Refuses a wrong workdir before the set-up's long work.

  Raises:
    ConfigError, FileError: as `train`.
  """
  check_settings(config.train)
  if resume:
    check_same_config(workdir, config)
  checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
  latest = checkpoints.latest_step
  if resume and latest is None:
    raise CheckpointError(
      f"{workdir} holds no checkpoint yet; start without --resume"
    )
  if latest is not None and not resume:
    raise CheckpointError(
      f"{workdir} holds a run at step {latest}; continue it with --resume or "
      "choose another --workdir"
    )
  return checkpoints


def _summarize(
  pending: list[tuple[SlotSums, dict[str, np.ndarray]]], step: int
) -> dict[str, Any]:
  """Of the steps since the last log; refuses what is not finite."""
  first = step - len(pending) + 1
  for offset, (sums, norms) in enumerate(pending):
    values: dict[str, Any] = {"loss": sums.loss, **norms}
    for name, value in values.items():
      if not np.isfinite(value):
        raise TrainingDiverged(
          f"{name} is {value} at step {first + offset}; lower "
          "train.learning_rate or resume from an earlier checkpoint"
        )
  record = _as_lists(summarize(_add([sums for sums, _ in pending])))
  record["slots"] /= len(pending)
  every = [norms for _, norms in pending]
  means = {name: np.mean([n[name] for n in every]) for name in every[0]}
  return record | _as_lists(means)


def _add(sums: list[SlotSums]) -> SlotSums:
  return jax.tree.map(lambda *parts: np.sum(parts, axis=0), *sums)


def _as_lists(values: dict[str, Any]) -> dict[str, Any]:
  return {name: np.asarray(value).tolist() for name, value in values.items()}
