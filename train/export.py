"""Writes a trained drafter in a published layout, which other engines read.

    python -m train.export --workdir=runs/cpu --output=drafter
    python -m train.export --drafter=drafter --output=small --quantize=fp8
    python -m train.export --drafter=drafter --output=other --layout=speculators
    python -m train.export --drafter=drafter --output=card --model_card

--drafter takes one that is published already, in any layout. --layout=release
is that of each drafter's own release: a block drafter's vocabulary goes into a
file of its own beside the weights; EAGLE-3 has a place for it. A small language
model is written whole: tables that it borrows are copied from the target.
--layout=speculators is that of the package, which names the target. See
docs/drafters.md; for --quantize=fp8, kernels in 8 bits, docs/fp8.md.
--model_card adds a README.md with results of eval.main: docs/interchange.md.
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
from dflash_jax.target import Params
from pallas_kernels.devices import cache_sizes
from train.checkpoint import quieten_orbax
from train.drafter_sources import (
  Drafter,
  read_checkpoint,
  read_directory,
  with_verifier,
)
from train.files import FileError
from train.model_card import read_results, write_card
from train.record import read_config

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
class _Form:
  """How a drafter is written; fields are those of `export`.

  Raises:
    ConfigError: a choice that does not exist.
  """

  dtype: str
  quantize: str
  layout: str
  verifier: str

  def __post_init__(self):
    if self.dtype not in ("", "bfloat16", "float32"):
      raise ConfigError(
        f"--dtype={self.dtype} is unknown; choose bfloat16 or float32"
      )
    if self.quantize not in ("", "fp8"):
      raise ConfigError(f"--quantize={self.quantize} is unknown; choose fp8")
    if self.layout not in ("release", "speculators"):
      raise ConfigError(
        f"--layout={self.layout} is unknown; choose release or speculators"
      )

  @property
  def with_head(self) -> bool:
    """Whether files hold the target's head for a draft vocabulary."""
    return self.layout == "speculators"


def export(
  workdir: str,
  output: str,
  step: str = "best",
  dtype: str = "",
  quantize: str = "",
  layout: str = "release",
  verifier: str = "",
) -> Exported:
  """Writes the drafter of one checkpoint, and checks that it reads back.

  Args:
    workdir: of a train.main run, which may still be going on.
    output: a new directory, or that of an earlier drafter.
    step: "best" by held-out tau, "latest", or a number.
    dtype: on disk, "bfloat16", which "" is too, or "float32".
    quantize: "fp8" for kernels in 8 bits, "" for none.
    layout: "release" or "speculators".
    verifier: the target as other engines find it, a hub id or a directory in
      Hugging Face layout; "" takes what the run, or the source, names.

  Raises:
    ConfigError: a choice that does not exist, or another drafter's target.
    FileError: a workdir without such a checkpoint.
    WeightsError: a drafter that the layout cannot say, or an output that cannot
      be written.
  """
  form = _Form(dtype or "bfloat16", quantize, layout, verifier)
  with_head = form.with_head and not pathlib.Path(verifier or "?").is_dir()
  drafter = read_checkpoint(workdir, step, with_head)
  assert drafter.facts is not None
  return dataclasses.replace(
    _write_checked(drafter, output, form),
    step=drafter.facts["step"],
    tau=drafter.facts["held_out_tau"],
  )


def convert(
  source: str,
  output: str,
  dtype: str = "",
  quantize: str = "",
  layout: str = "release",
  verifier: str = "",
) -> Exported:
  """Writes a drafter that is in a published layout once more.

  Args:
    source: its directory, or "owner/name" on the hub.
    output, quantize, layout, verifier: as in `export`.
    dtype: on disk, "bfloat16", "float32", or "" as it is stored.

  Raises:
    ConfigError: no drafter of weights, one that is in 8 bits already, or as in
      `export`.
    WeightsError: nothing usable is there, or as in `export`.
  """
  form = _Form(dtype, quantize, layout, verifier)
  if source in ("none", "ngram"):
    raise ConfigError(
      f"--drafter={source} has no weights to write; name the directory of a "
      "block drafter, EAGLE-3 or small language model"
    )
  drafter = read_directory(source, dtype=None)
  leaves = jax.tree.leaves(drafter.params, is_leaf=fp8.is_kernel)
  if quantize and any(map(fp8.is_kernel, leaves)):
    raise ConfigError(
      f"--drafter={source} is in 8 bits already; name the drafter that it was "
      "made from"
    )
  return _write_checked(drafter, output, form)


# --- Writing ------------------------------------------------------------------


def _write_checked(drafter: Drafter, output: str, form: _Form) -> Exported:
  """Writes a drafter and reads it back."""
  if form.verifier:
    drafter = with_verifier(drafter, form.verifier, form.with_head)
  network, params = drafter.formulas.config, drafter.params
  if form.quantize:
    params = weights.quantize_drafter(network, params)
  written = dataclasses.replace(drafter, params=params)
  dtype = form.dtype or None
  _write(output, written, form.layout, dtype)
  _check_reads_back(output, written, dtype)
  return Exported(
    parameters=drafter.formulas.count_parameters(),
    bytes=sum(path.stat().st_size for path in pathlib.Path(output).iterdir()),
    weight_bytes=fp8.stored_bytes(params, dtype),
    whole_bytes=fp8.stored_bytes(drafter.params, dtype),
  )


def _write(
  output: str, drafter: Drafter, layout: str, dtype: str | None
) -> None:
  """Saves a drafter in a layout."""
  formulas, params, ids = drafter.formulas, drafter.params, drafter.ids
  vocabulary = None if ids is None else np.array(ids, np.int32)
  how: dict[str, Any] = {"dtype": dtype, "extra": drafter.facts}
  if layout == "speculators":
    if isinstance(formulas, LanguageModel):
      raise ConfigError(
        "--layout=speculators has no place for a small language model, which "
        "engines take as it is; use --layout=release"
      )
    weights.save_speculators(
      output,
      formulas.config,
      params,
      drafter.serving,
      draft_vocabulary=vocabulary,
      head=drafter.head,
      **how,
    )
  elif isinstance(formulas, DFlash):
    weights.save_drafter(
      output, formulas.config, params, draft_vocabulary=vocabulary, **how
    )
  elif isinstance(formulas, Eagle3):
    weights.save_eagle3(output, formulas.config, params, **how)
  else:
    weights.save_target(output, formulas.config, params, **how)


def _check_reads_back(output: str, drafter: Drafter, dtype: str | None) -> None:
  """Raises WeightsError unless the directory says what was to be written."""
  found = read_directory(output, dtype=None)

  def stored(leaf: Any) -> Any:
    if fp8.is_kernel(leaf) or jnp.issubdtype(leaf.dtype, jnp.integer):
      return leaf
    return leaf.astype(dtype or leaf.dtype)

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
    "drafter", None, "Instead of a run, a drafter in a published layout."
  )
  flags.DEFINE_string("output", None, "Directory for the drafter.")
  flags.DEFINE_string(
    "step", "best", "Checkpoint: best (held-out tau), latest, or its step."
  )
  flags.DEFINE_string(
    "dtype",
    "",
    "On disk: bfloat16 or float32; by default as --drafter is stored, and "
    "bfloat16 of a run.",
  )
  flags.DEFINE_string("quantize", "", "fp8 for kernels in 8 bits.")
  flags.DEFINE_string("layout", "release", "Of the files: or speculators.")
  flags.DEFINE_string(
    "verifier", "", "The target by the name that other engines know."
  )
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
  how = (values.dtype, values.quantize, values.layout, values.verifier)
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
    print(_beside_caches(exported))
  if values.model_card:
    config = read_config(values.workdir) if values.workdir else None
    write_card(values.output, results, config=config, license_id=values.license)


def _beside_caches(exported: Exported) -> str:
  """What 8 bits save, beside the caches that may hold the drafter."""
  ratio = exported.weight_bytes / exported.whole_bytes
  sizes = cache_sizes()
  caches = ", ".join(
    f"{model} {sizes[model] / _MIB:.0f} MiB" for model in ("H100", "B200")
  )
  return (
    f"weights: {exported.weight_bytes / _MIB:.1f} MiB, {ratio:.2f} of the "
    f"{exported.whole_bytes / _MIB:.1f} MiB without; L2 caches: {caches}"
  )


if __name__ == "__main__":
  command.run(main, define_flags, errors=(FileError,))
