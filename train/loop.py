"""The training loop, read downwards: set up, step, log, evaluate, keep."""

import contextlib
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging

from dflash_jax.config import Config
from train.checkpoint import CheckpointError, Checkpoints
from train.mesh import round_up
from train.meter import Meter, update_flops
from train.prefetch import prefetch
from train.preview import Preview
from train.processes import is_first
from train.record import (
  Run,
  check_same_config,
  check_same_run,
  write_run,
)
from train.settings import check_settings
from train.setup import Setup
from train.state import TrainState
from train.sums import SlotSums, summarize
from train.trackers import check_trackers, open_trackers
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
  elif is_first():
    write_run(workdir, config, run)
  first = int(state.step)
  logging.info(
    "drafter: %d parameters; corpus: %d training and %d held-out sequences",
    trainer.drafter.count_parameters(),
    len(setup.corpus.train),
    len(setup.corpus.held_out),
  )

  meter = Meter(
    update_flops(
      trainer,
      state,
      setup.target_params,
      setup.borrowed,
      setup.train_batch(first),
    ),
    settings.compute_dtype,
  )
  preview = Preview.create(config, setup) if settings.decode_every else None

  # --- Step -------------------------------------------------------------------
  result = None
  pending: list[tuple[SlotSums, dict[str, jax.Array]]] = []
  say = tqdm.tqdm.write if is_first() else logging.debug
  batches = prefetch(setup.train_batch, range(first, settings.steps))
  with (
    open_trackers(config, workdir, first) as log,
    contextlib.closing(batches),
    tqdm.tqdm(
      total=settings.steps,
      initial=first,
      desc="train",
      disable=not is_first(),
    ) as bar,
  ):
    for done, batch in enumerate(batches, start=first + 1):
      state, sums, norms = trainer.update(
        state, setup.target_params, setup.borrowed, batch
      )
      meter.follow(sums)
      pending.append((sums, norms))
      bar.update()
      keeps = (
        done % settings.evaluate_every == 0
        or done % settings.checkpoint_every == 0
        or done == settings.steps
      )

      # --- Log ----------------------------------------------------------------
      # At checkpoints too, so that a resumed run writes the same lines.
      if keeps or done % settings.log_every == 0:
        record = _summarize(jax.device_get(pending), done)
        record |= meter.read(record["slots"])
        log.write("train", done, record)
        bar.set_postfix_str(_in_short(record))
        pending = []

      # --- Decode -------------------------------------------------------------
      if preview and done % settings.decode_every == 0:
        record = preview.decode(state.drafter)
        log.write("decode", done, record)
        say(f"step {done}: tau {record['tau']:.3f} (decoded)")
        meter.restart()

      # --- Evaluate and keep --------------------------------------------------
      if keeps:
        result, record = evaluate(setup, state)
        log.write("held_out", done, record)
        say(f"step {done}: held-out tau {result.tau:.3f} (walked)")
        checkpoints.save(state, result.tau)
        meter.restart()
  checkpoints.close()
  return result or evaluate(setup, state)[0]


def evaluate(setup: Setup, state: TrainState) -> tuple[Walk, dict[str, Any]]:
  """Walks the held-out answers; also what metrics.jsonl says of them."""
  params = state.drafter
  right, masks, sums = [], [], []
  size = round_up(setup.trainer.mesh, EVALUATION_BATCH)
  for start in range(0, len(setup.evaluation), size):
    part = setup.evaluation[start : start + size]
    batch = setup.batch(part, rows=size)
    matches, part_sums = setup.trainer.matches(
      params, setup.target_params, setup.borrowed, batch
    )
    right.append(np.asarray(matches)[: len(part)])
    masks.append(setup.corpus.batch(part, batch.tokens.shape[1])[1])
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
  check_trackers(config.train.trackers)
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


def _in_short(record: dict[str, Any]) -> str:
  """What the progress bar says of a record."""
  parts = [f"loss {record['loss']:.3f}", f"tau~{record['anchor_tau']:.2f}"]
  if "slots_per_s" in record:
    parts.append(f"{record['slots_per_s']:.0f} slots/s")
  if "mfu" in record:
    parts.append(f"MFU {record['mfu']:.1%}")
  return " ".join(parts)


def _add(sums: list[SlotSums]) -> SlotSums:
  return jax.tree.map(lambda *parts: np.sum(parts, axis=0), *sums)


def _as_lists(values: dict[str, Any]) -> dict[str, Any]:
  return {name: np.asarray(value).tolist() for name, value in values.items()}
