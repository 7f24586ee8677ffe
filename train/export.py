"""Writes a trained drafter in the published layout, which other engines read.

    python -m train.export --workdir=runs/cpu --output=drafter

A block drafter's vocabulary goes into a file of its own beside the weights;
EAGLE-3 has a place for it. A small language model is written whole: tables that
it borrows are copied from the target.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dflash_jax import command, weights
from dflash_jax.config import Config, ConfigError
from dflash_jax.drafters import DFlash, Eagle3
from dflash_jax.model import borrow, load_target
from dflash_jax.target import Params
from train.checkpoint import CheckpointError, Checkpoints, quieten_orbax
from train.design import Network, Trainable, make_drafter
from train.files import FileError
from train.record import read_config, read_run

Ids = tuple[int, ...] | None  # a draft vocabulary


@dataclasses.dataclass(frozen=True)
class Exported:
  """What was written.

  Attributes:
    step: of the checkpoint.
    tau: walked on held-out answers at that step.
    parameters: of the drafter, those that were trained.
    bytes: of its files.
  """

  step: int
  tau: float
  parameters: int
  bytes: int


def export(
  workdir: str, output: str, step: str = "best", dtype: str = "bfloat16"
) -> Exported:
  """Writes the drafter of one checkpoint, and checks that it reads back.

  Args:
    workdir: of a train.main run, which may still be going on.
    output: a new directory, or that of an earlier drafter.
    step: "best" by held-out tau, "latest", or a number.
    dtype: on disk, "bfloat16" or "float32".

  Raises:
    ConfigError: a step or dtype that does not exist.
    FileError: a workdir without such a checkpoint.
    WeightsError: an output that cannot be written.
  """
  if dtype not in ("bfloat16", "float32"):
    raise ConfigError(f"--dtype={dtype} is unknown; choose bfloat16 or float32")
  config, run = read_config(workdir), read_run(workdir)
  checkpoints = Checkpoints(
    workdir, config.train.keep_checkpoints, read_only=True
  )
  number = _choose_step(checkpoints, step)
  drafter = make_drafter(config.drafter, run.drafter)
  ids = run.draft_vocabulary
  params = checkpoints.restore_drafter(
    drafter, number, columns=None if ids is None else len(ids)
  )
  tau = checkpoints.taus[number]
  checkpoints.close()
  params = _complete(config, drafter, params, ids)
  origin = {"run": config.name, "target": config.target.path, "step": number}
  extra = {**origin, "held_out_tau": tau}
  _write(output, drafter, params, ids, dtype, extra)
  _check_reads_back(output, drafter, params, ids, dtype)
  return Exported(
    step=number,
    tau=tau,
    parameters=drafter.count_parameters(),
    bytes=sum(path.stat().st_size for path in pathlib.Path(output).iterdir()),
  )


def _choose_step(checkpoints: Checkpoints, step: str) -> int:
  if step.isdecimal():
    return int(step)
  choices = {"best": checkpoints.best_step, "latest": checkpoints.latest_step}
  if step not in choices:
    raise ConfigError(f"--step={step} is unknown; choose best, latest or N")
  number = choices[step]
  if number is None:
    raise CheckpointError(
      f"{checkpoints.directory} holds no checkpoint yet; let train.main run"
    )
  return number


def _complete(
  config: Config, drafter: Trainable, params: Params, ids: Ids
) -> Params:
  """What a reader of the checkpoint should find."""
  if isinstance(drafter, DFlash):
    return params
  if isinstance(drafter, Eagle3):
    if ids is None or len(ids) == drafter.config.vocab_size:
      return params
    return {**params, "head_ids": jnp.array(ids, jnp.int32)}
  if not drafter.borrows:
    return drafter.bind(params)
  return drafter.bind(params, borrow(load_target(config)[1], None))


def _write(
  output: str,
  drafter: Trainable,
  params: Params,
  ids: Ids,
  dtype: str,
  extra: dict[str, Any],
) -> None:
  """Saves what `_complete` gave, in the layout of its kind."""
  if isinstance(drafter, DFlash):
    weights.save_drafter(
      output,
      drafter.config,
      params,
      draft_vocabulary=None if ids is None else np.array(ids, np.int32),
      dtype=dtype,
      extra=extra,
    )
  elif isinstance(drafter, Eagle3):
    weights.save_eagle3(
      output, drafter.config, params, dtype=dtype, extra=extra
    )
  else:
    weights.save_target(
      output, drafter.config, params, dtype=dtype, extra=extra
    )


def _check_reads_back(
  output: str, drafter: Trainable, params: Params, ids: Ids, dtype: str
) -> None:
  """Raises WeightsError unless the directory says what was trained."""
  network: Network
  known = ids
  if isinstance(drafter, DFlash):
    network, loaded, vocabulary = weights.load_drafter(output)
    known = None if vocabulary is None else tuple(vocabulary.tolist())
  elif isinstance(drafter, Eagle3):
    network, loaded = weights.load_eagle3(output)
  else:
    network, loaded = weights.load_target(output)

  def stored(leaf: jax.Array) -> jax.Array:
    is_id = jnp.issubdtype(leaf.dtype, jnp.integer)
    return leaf if is_id else leaf.astype(dtype).astype(jnp.float32)

  expected = _by_path(jax.tree.map(stored, params))
  found = _by_path(loaded)
  same = (
    network == drafter.config
    and known == ids
    and found.keys() == expected.keys()
    and all(np.array_equal(found[path], expected[path]) for path in found)
  )
  if not same:
    raise weights.WeightsError(
      f"{output} does not read back as it was written; check the disk and "
      "export again"
    )


def _by_path(params: Params) -> dict[str, jax.Array]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def define_flags() -> None:
  """The flags of python -m train.export; the run brings its own config."""
  flags.DEFINE_string("workdir", None, "Directory of a train.main run.")
  flags.DEFINE_string("output", None, "Directory for the drafter.")
  flags.DEFINE_string(
    "step", "best", "Checkpoint: best (held-out tau), latest, or its step."
  )
  flags.DEFINE_string("dtype", "bfloat16", "On disk: bfloat16 or float32.")


def main(_: Config) -> None:
  """Entry point of python -m train.export."""
  values = flags.FLAGS
  for name in ("workdir", "output"):
    if not getattr(values, name):
      raise ConfigError(f"--{name}=DIR is missing")
  quieten_orbax()
  exported = export(values.workdir, values.output, values.step, values.dtype)
  print(
    f"{values.output}: step {exported.step}, held-out tau {exported.tau:.3f} "
    f"(walked), {exported.parameters:,} parameters in {exported.bytes:,} bytes"
  )


if __name__ == "__main__":
  command.run(main, define_flags, errors=(FileError,))
