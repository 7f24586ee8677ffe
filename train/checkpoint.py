"""Orbax checkpoints of a training run: the newest few, and the best."""

import json
import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from train.corpus import write_whole
from train.step import TrainState


class CheckpointError(ValueError):
  """A checkpoint that cannot be written or read; says what to do."""


class Checkpoints:
  """The checkpoints/ directory of a workdir.

  Orbax writes into a temporary name and renames, so a killed save leaves
  nothing that `restore` would read.
  """

  def __init__(self, workdir: str, keep: int):
    """Opens or creates `workdir`/checkpoints.

    Args:
      workdir: of the run.
      keep: newest checkpoints kept, besides the one of best held-out tau.
    """
    policies = ocp.training.preservation_policies
    self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
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
      cleanup_tmp_directories=True,
    )

  @property
  def latest_step(self) -> int | None:
    """Step of the newest checkpoint, None before the first."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  @property
  def best_step(self) -> int | None:
    """Step with the highest held-out tau, None before the first."""
    scored = [
      (checkpoint.metrics["tau"], checkpoint.step)
      for checkpoint in self._checkpointer.checkpoints
      if checkpoint.metrics
    ]
    return max(scored)[1] if scored else None

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
    """Reads the checkpoint of `step`, the newest by default.

    Raises:
      CheckpointError: if there is none, or it does not fit `like`.
    """
    step = self.latest_step if step is None else step
    if step is None:
      raise CheckpointError(
        f"{self.directory} holds no checkpoint; start without --resume"
      )
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      _as_dict(like),
    )
    try:
      return TrainState(**self._checkpointer.load(step, abstract))
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise CheckpointError(
        f"cannot read checkpoint {step} under {self.directory}: {error}; "
        "delete it to continue from the one before"
      ) from error

  def close(self) -> None:
    """Waits for pending work."""
    self._checkpointer.close()


def write_record(workdir: str, name: str, text: str) -> None:
  """Writes a small text file of the run whole."""
  directory = pathlib.Path(workdir)
  directory.mkdir(parents=True, exist_ok=True)
  write_whole(directory / name, text.encode())


def read_record(workdir: str, name: str) -> Any:
  """A JSON record of the run.

  Raises:
    CheckpointError: if the workdir has none.
  """
  path = pathlib.Path(workdir) / name
  if not path.is_file():
    raise CheckpointError(
      f"{path} is missing; give the --workdir of a train.main run"
    )
  return json.loads(path.read_text())


def _as_dict(state: TrainState) -> dict[str, Any]:
  return {
    "step": state.step,
    "params": state.params,
    "optimizer": state.optimizer,
    "tap_scale": state.tap_scale,
  }
