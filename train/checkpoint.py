"""Orbax checkpoints of a training run: the newest few, and the best."""

import logging
import os
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from train.files import FileError
from train.step import TrainState


class CheckpointError(FileError):
  """A checkpoint that cannot be written or read; says what to do."""


class Checkpoints:
  """The checkpoints/ directory of a workdir.

  Orbax writes into a temporary name and renames, so a killed save leaves
  nothing that `restore` would read.
  """

  def __init__(
    self, workdir: str | os.PathLike[str], keep: int, read_only: bool = False
  ):
    """Opens or creates `workdir`/checkpoints.

    Args:
      workdir: of the run.
      keep: newest checkpoints kept, besides the one of best held-out tau.
      read_only: leave unfinished saves alone: their run may be alive.

    Raises:
      CheckpointError: if it cannot be created or read.
    """
    policies = ocp.training.preservation_policies
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
    try:
      self._checkpointer = ocp.training.Checkpointer(
        self.directory,
        preservation_policy=policies.AnyPreservationPolicy(
          [
            policies.LatestN(keep),
            policies.BestN(
              get_metric_fn=lambda metrics: metrics["tau"],
              n=1,
              keep_checkpoints_without_metrics=False,
            ),
          ]
        ),
        cleanup_tmp_directories=not read_only,
      )
    except (OSError, ValueError) as error:
      raise CheckpointError(
        f"cannot open {self.directory}: {error}; choose another --workdir"
      ) from error

  @property
  def taus(self) -> dict[int, float]:
    """Held-out tau of each checkpoint, by step."""
    return {
      checkpoint.step: checkpoint.metrics["tau"]
      for checkpoint in self._checkpointer.checkpoints
      if checkpoint.metrics
    }

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None before the first."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  @property
  def best_step(self) -> int | None:
    """Step with the highest held-out tau, None before the first."""
    taus = self.taus
    return max(taus, key=lambda step: (taus[step], step)) if taus else None

  def save(self, state: TrainState, tau: float) -> None:
    """Writes a checkpoint, complete or not at all.

    Raises:
      CheckpointError: when the disk refuses, a full one included.
    """
    step = int(state.step)
    if step == self.latest_step:
      return
    try:
      self._checkpointer.save(step, _as_dict(state), metrics={"tau": tau})
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
      raise CheckpointError(
        f"cannot write checkpoint {step} under {self.directory}: {error}; free "
        "space, then continue with --resume"
      ) from error

  def restore(self, like: TrainState, step: int | None = None) -> TrainState:
    """Reads a checkpoint.

    Args:
      like: arrays, or their shapes and types, of the state to expect.
      step: of the checkpoint; the newest by default.

    Raises:
      CheckpointError: if there is none, or it does not fit `like`.
    """
    step = self.latest_step if step is None else step
    if step is None:
      raise CheckpointError(
        f"{self.directory} holds no checkpoint; start without --resume"
      )
    known = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
    if step not in known:
      raise CheckpointError(
        f"{self.directory} holds no checkpoint of step {step}; it has {known}"
      )
    try:
      loaded = self._checkpointer.load(
        step, jax.tree.map(_abstract, _as_dict(like))
      )
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise CheckpointError(
        f"cannot read checkpoint {step} under {self.directory}: {error}; "
        "delete it to continue from the one before"
      ) from error
    return TrainState(**loaded)

  def close(self) -> None:
    """Waits for pending work."""
    self._checkpointer.close()


def quieten_orbax() -> None:
  """Keeps orbax's running commentary off the screen; warnings stay.

  Its background threads also log, at length, what they raise: the caller gets
  the same exception.
  """

  def is_news(record: logging.LogRecord) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname:
      return True
    return (
      record.levelno >= logging.WARNING and record.filename != "future.py"
    )

  logging.getLogger("absl").addFilter(is_news)


def _as_dict(state: TrainState) -> dict[str, Any]:
  return {
    "step": state.step,
    "params": state.params,
    "optimizer": state.optimizer,
    "tap_scale": state.tap_scale,
  }


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding
  if sharding is None:  # of a shape alone
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
