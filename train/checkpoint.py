"""Orbax checkpoints of a training run: the newest few, and the best."""

import functools
import logging
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from dflash_jax.target import Params
from train.design import Trainable
from train.files import FileError
from train.state import TrainState, fold_tap_scale


class CheckpointError(FileError):
  """A checkpoint that cannot be written or read; says what to do."""


class Checkpoints:
  """The checkpoints/ directory of a workdir.

  Orbax writes into a temporary name and renames, so a killed save leaves
  nothing that `restore` would read. It does not notice bytes that changed on
  the disk later: checksums of what was saved are kept with the metrics.
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
        f"cannot open {self.directory}: {error}; delete the damaged "
        "checkpoint or choose another --workdir"
      ) from error

  @property
  def _metrics(self) -> dict[int, dict[str, Any]]:
    return {
      checkpoint.step: checkpoint.metrics or {}
      for checkpoint in self._checkpointer.checkpoints
    }

  @property
  def taus(self) -> dict[int, float]:
    """Held-out tau of each checkpoint, by step."""
    return {step: metrics["tau"] for step, metrics in self._metrics.items()}

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
      self._checkpointer.save(
        step,
        _as_dict(state),
        metrics={"tau": tau, "checksums": _checksums(_as_dict(state))},
      )
    except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
      raise CheckpointError(
        f"cannot write checkpoint {step} under {self.directory}: {error}; free "
        "space, then continue with --resume"
      ) from error

  def restore(self, like: TrainState) -> TrainState:
    """Reads the newest checkpoint.

    Args:
      like: a state of the shapes and types to expect.

    Raises:
      CheckpointError: if there is none, or it does not fit `like`.
    """
    if self.latest_step is None:
      raise CheckpointError(
        f"{self.directory} holds no checkpoint; start without --resume"
      )
    abstract = jax.tree.map(_abstract, _as_dict(like))
    return TrainState(**self._load(self.latest_step, abstract))

  def restore_drafter(
    self, drafter: Trainable, step: int, columns: int | None = None
  ) -> Params:
    """Reads the drafter proper out of a checkpoint, its masters folded.

    Args:
      drafter: what was trained.
      step: of the checkpoint; the average of weights if it holds one.
      columns: V', of a trimmed head.

    Raises:
      CheckpointError: if there is none of that step, or it does not fit.
    """
    if step not in self.taus:
      raise CheckpointError(
        f"{self.directory} holds no checkpoint of step {step}; it has "
        f"{sorted(self.taus)}"
      )
    params = jax.eval_shape(
      functools.partial(drafter.init, columns=columns), jax.random.key(0)
    )
    saved = self._metrics[step].get("checksums", {})
    name = "average" if "average" in saved else "params"
    wanted = {name: params}
    if "context_projection" in params:
      width, _ = params["context_projection"]["kernel"].shape
      wanted["tap_scale"] = jax.ShapeDtypeStruct((width,), jnp.float32)
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # without the optimizer
    with context:
      loaded = self._load(step, jax.tree.map(_abstract, wanted))
    return fold_tap_scale(loaded[name], loaded.get("tap_scale"))

  def _load(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    try:
      loaded = self._checkpointer.load(step, abstract)
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise self._cannot_read(step, error) from error
    saved = self._metrics[step].get("checksums", {})
    if _checksums(loaded) != {name: saved.get(name) for name in loaded}:
      raise self._cannot_read(step, "its bytes are not those that were saved")
    return loaded

  def _cannot_read(self, step: int, why: object) -> CheckpointError:
    return CheckpointError(
      f"cannot read checkpoint {step} under {self.directory}: {why}; delete it "
      "to continue from the one before"
    )

  def close(self) -> None:
    """Waits for pending work."""
    self._checkpointer.close()


def quieten_orbax() -> None:
  """Keeps orbax's running commentary off the screen; warnings stay.

  Its background threads also log, at length, what they raise; the caller gets
  the same exceptions.
  """

  def is_news(record: logging.LogRecord) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname:
      return True
    return record.levelno >= logging.WARNING and not record.exc_info

  logging.getLogger("absl").addFilter(is_news)


def _as_dict(state: TrainState) -> dict[str, Any]:
  parts = {
    "step": state.step,
    "params": state.params,
    "optimizer": state.optimizer,
    "tap_scale": state.tap_scale,
    "average": state.average,
  }
  return {name: part for name, part in parts.items() if part is not None}


def _checksums(tree: dict[str, Any]) -> dict[str, int]:
  """One number for all the bits under each name.

  A sum over elements, so that it is the same however these are split among
  devices, and no device needs to see more than its own.
  """
  return {name: int(part) for name, part in _sum_bits(tree).items()}


@jax.jit
def _sum_bits(tree: dict[str, Any]) -> dict[str, jax.Array]:
  return {
    name: sum(
      (
        _hash(leaf, number) for number, leaf in enumerate(jax.tree.leaves(part))
      ),
      start=jnp.uint32(0),
    )
    for name, part in tree.items()
  }


def _hash(leaf: jax.Array, number: int) -> jax.Array:
  """u32[]: of a leaf's bits, and of where each element stands."""
  bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
  place = _mix(jnp.uint32(number))
  for axis, size in enumerate(leaf.shape):
    stride = math.prod(leaf.shape[axis + 1 :]) % 2**32
    row = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(stride)
    place += row.reshape(-1, *[1] * (leaf.ndim - axis - 1))
  return _mix(bits ^ _mix(place)).sum(dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """A permutation of u32 in which every bit moves every other.

  MurmurHash3's finaliser, https://github.com/aappleby/smhasher.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  sharding = leaf.sharding
  if sharding is None:  # of a shape alone
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
