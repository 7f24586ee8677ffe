"""Writes a trained drafter in the published layout, which other engines read.

    python -m train.export --workdir=runs/cpu --output=drafter
    python -m train.export --drafter=drafter --output=small --quantize=fp8
    python -m train.export --drafter=drafter --output=card --model_card

A block drafter's vocabulary goes into a file of its own beside the weights;
EAGLE-3 has a place for it. A small language model is written whole: tables that
it borrows are copied from the target. --drafter takes one that is in the layout
already; --quantize=fp8 stores kernels in 8 bits, see docs/fp8.md. --model_card
adds a README.md with results of eval.main, see docs/interchange.md.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dflash_jax import command, fp8, weights
from dflash_jax.config import Config, ConfigError
from dflash_jax.drafters import DFlash, Eagle3, LanguageModel
from dflash_jax.model import borrow, load_target
from dflash_jax.target import Params
from dflash_jax.weights.fields import read_json
from pallas_kernels.devices import cache_sizes
from train.checkpoint import CheckpointError, Checkpoints, quieten_orbax
from train.design import Trainable, make_drafter
from train.files import FileError
from train.model_card import read_results, write_card
from train.record import read_config, read_run

Ids = tuple[int, ...] | None  # a draft vocabulary
_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Exported:
  """What was written.

  Attributes:
    parameters: of the drafter, those that were trained.
    bytes: of its files.
    weight_bytes: of its parameters as stored.
    whole_bytes: of the same without kernels in 8 bits.
    step: of the checkpoint; None for a drafter that was in a directory.
    tau: walked on held-out answers at that step.
  """

  parameters: int
  bytes: int
  weight_bytes: int
  whole_bytes: int
  step: int | None = None
  tau: float | None = None


@dataclasses.dataclass(frozen=True)
class _Drafter:
  """A drafter to write.

  Attributes:
    formulas: of it.
    params: that a reader should find.
    ids: its draft vocabulary, where no parameter holds it.
    facts: where it came from, for config.json.
  """

  formulas: Trainable
  params: Params
  ids: Ids
  facts: dict[str, Any] | None


def export(
  workdir: str,
  output: str,
  step: str = "best",
  dtype: str = "bfloat16",
  quantize: str = "",
) -> Exported:
  """Writes the drafter of one checkpoint, and checks that it reads back.

  Args:
    workdir: of a train.main run, which may still be going on.
    output: a new directory, or that of an earlier drafter.
    step: "best" by held-out tau, "latest", or a number.
    dtype: on disk, "bfloat16" or "float32".
    quantize: "fp8" for kernels in 8 bits, "" for none.

  Raises:
    ConfigError: a step, dtype or quantisation that does not exist.
    FileError: a workdir without such a checkpoint.
    WeightsError: an output that cannot be written.
  """
  _check_choices(dtype, quantize)
  drafter = _read_run(workdir, step)
  assert drafter.facts is not None
  return dataclasses.replace(
    _write_checked(drafter, output, dtype, quantize),
    step=drafter.facts["step"],
    tau=drafter.facts["held_out_tau"],
  )


def convert(
  source: str, output: str, dtype: str = "bfloat16", quantize: str = ""
) -> Exported:
  """Writes a drafter that is in a published layout once more.

  Args:
    source: its directory, or "owner/name" on the hub.
    output, dtype, quantize: as in `export`.

  Raises:
    ConfigError: no drafter of weights, or one that is in 8 bits already.
    WeightsError: nothing usable is there, or an output that cannot be written.
  """
  _check_choices(dtype, quantize)
  if source in ("none", "ngram"):
    raise ConfigError(
      f"--drafter={source} has no weights to write; name the directory of a "
      "block drafter, EAGLE-3 or small language model"
    )
  drafter = _read_directory(source)
  leaves = jax.tree.leaves(drafter.params, is_leaf=fp8.is_kernel)
  if quantize and any(map(fp8.is_kernel, leaves)):
    raise ConfigError(
      f"--drafter={source} is in 8 bits already; name the drafter that it was "
      "made from"
    )
  return _write_checked(drafter, output, dtype, quantize)


def _check_choices(dtype: str, quantize: str) -> None:
  if dtype not in ("bfloat16", "float32"):
    raise ConfigError(f"--dtype={dtype} is unknown; choose bfloat16 or float32")
  if quantize not in ("", "fp8"):
    raise ConfigError(f"--quantize={quantize} is unknown; choose fp8")


# --- Where a drafter comes from -----------------------------------------------


def _read_run(workdir: str, step: str) -> _Drafter:
  """A checkpoint of a run."""
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
  apart = ids if isinstance(drafter, DFlash) else None
  return _Drafter(drafter, params, apart, {**origin, "held_out_tau": tau})


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


def _read_directory(source: str) -> _Drafter:
  """A drafter in a published layout, of whichever kind."""
  formulas: Trainable
  ids: Ids = None
  kind = weights.drafter_kind(source)
  if kind == "dflash":
    blocks, params, vocabulary = weights.load_drafter(source)
    formulas = DFlash(blocks)
    ids = None if vocabulary is None else tuple(vocabulary.tolist())
  elif kind == "eagle3":
    eagle, params = weights.load_eagle3(source)
    formulas = Eagle3(eagle, max_drafts=1)
  else:
    model, params = weights.load_target(source, drafts=True)
    formulas = LanguageModel(model, max_drafts=1)
  return _Drafter(formulas, params, ids, _read_facts(source))


def _read_facts(source: str) -> dict[str, Any] | None:
  """What an earlier export said of where the drafter came from."""
  directory = pathlib.Path(source)
  if not directory.is_dir():
    return None
  facts = read_json(directory / "config.json").get("dflash_jax")
  return facts if isinstance(facts, dict) else None


# --- Writing ------------------------------------------------------------------


def _write_checked(
  drafter: _Drafter, output: str, dtype: str, quantize: str
) -> Exported:
  """Writes a drafter and reads it back."""
  network, params = drafter.formulas.config, drafter.params
  if quantize:
    params = weights.quantize_drafter(network, params)
  written = dataclasses.replace(drafter, params=params)
  _write(output, written, dtype)
  _check_reads_back(output, written, dtype)
  return Exported(
    parameters=drafter.formulas.count_parameters(),
    bytes=sum(path.stat().st_size for path in pathlib.Path(output).iterdir()),
    weight_bytes=fp8.stored_bytes(params, dtype),
    whole_bytes=fp8.stored_bytes(drafter.params, dtype),
  )


def _write(output: str, drafter: _Drafter, dtype: str) -> None:
  """Saves a drafter in the layout of its kind."""
  formulas, params, ids = drafter.formulas, drafter.params, drafter.ids
  if isinstance(formulas, DFlash):
    weights.save_drafter(
      output,
      formulas.config,
      params,
      draft_vocabulary=None if ids is None else np.array(ids, np.int32),
      dtype=dtype,
      extra=drafter.facts,
    )
  elif isinstance(formulas, Eagle3):
    weights.save_eagle3(
      output, formulas.config, params, dtype=dtype, extra=drafter.facts
    )
  else:
    weights.save_target(
      output, formulas.config, params, dtype=dtype, extra=drafter.facts
    )


def _check_reads_back(output: str, drafter: _Drafter, dtype: str) -> None:
  """Raises WeightsError unless the directory says what was to be written."""
  found = _read_directory(output)

  def stored(leaf: Any) -> Any:
    if fp8.is_kernel(leaf) or jnp.issubdtype(leaf.dtype, jnp.integer):
      return leaf
    return leaf.astype(dtype).astype(jnp.float32)

  expected = _by_path(
    jax.tree.map(stored, drafter.params, is_leaf=fp8.is_kernel)
  )
  leaves = _by_path(found.params)
  same = (
    found.formulas.config == drafter.formulas.config
    and found.ids == drafter.ids
    and leaves.keys() == expected.keys()
    and all(np.array_equal(leaves[path], expected[path]) for path in leaves)
  )
  if not same:
    raise weights.WeightsError(
      f"{output} does not read back as it was written; check the disk and "
      "export again"
    )


def _by_path(params: Params) -> dict[str, jax.Array]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


# --- The program --------------------------------------------------------------


def define_flags() -> None:
  """The flags of python -m train.export; the run brings its own config."""
  flags.DEFINE_string("workdir", None, "Directory of a train.main run.")
  flags.DEFINE_string(
    "drafter", None, "Instead of a run, a drafter in the published layout."
  )
  flags.DEFINE_string("output", None, "Directory for the drafter.")
  flags.DEFINE_string(
    "step", "best", "Checkpoint: best (held-out tau), latest, or its step."
  )
  flags.DEFINE_string("dtype", "bfloat16", "On disk: bfloat16 or float32.")
  flags.DEFINE_string("quantize", "", "fp8 for kernels in 8 bits.")
  flags.DEFINE_bool("model_card", False, "Write a README.md beside it.")
  flags.DEFINE_list(
    "results", [], "Files that eval.main --json_out wrote, for the card."
  )
  flags.DEFINE_string("license", "", "For the card, such as apache-2.0.")


def main(_: Config) -> None:
  """Entry point of python -m train.export."""
  values = flags.FLAGS
  if bool(values.workdir) == bool(values.drafter):
    raise ConfigError("give one of --workdir=DIR, a run, and --drafter=DIR")
  if not values.output:
    raise ConfigError("--output=DIR is missing")
  if (values.results or values.license) and not values.model_card:
    raise ConfigError("--results and --license are for --model_card; add that")
  results = read_results(values.results)
  quieten_orbax()
  how = (values.dtype, values.quantize)
  if values.drafter:
    exported = convert(values.drafter, values.output, *how)
  else:
    exported = export(values.workdir, values.output, values.step, *how)
  step = ""
  if not values.drafter:
    tau = f"{exported.tau:.3f} (walked)"
    step = f"step {exported.step}, held-out tau {tau}, "
  print(
    f"{values.output}: {step}{exported.parameters:,} parameters in "
    f"{exported.bytes:,} bytes"
  )
  if values.quantize:
    print(_beside_caches(exported, values.dtype))
  if values.model_card:
    config = read_config(values.workdir) if values.workdir else None
    write_card(values.output, results, config=config, license_id=values.license)


def _beside_caches(exported: Exported, dtype: str) -> str:
  """What 8 bits save, beside the caches that may hold the drafter."""
  ratio = exported.weight_bytes / exported.whole_bytes
  sizes = cache_sizes()
  caches = ", ".join(
    f"{model} {sizes[model] / _MIB:.0f} MiB" for model in ("H100", "B200")
  )
  return (
    f"weights: {exported.weight_bytes / _MIB:.1f} MiB, {ratio:.2f} of the "
    f"{exported.whole_bytes / _MIB:.1f} MiB in {dtype}; L2 caches: {caches}"
  )


if __name__ == "__main__":
  command.run(main, define_flags, errors=(FileError,))
