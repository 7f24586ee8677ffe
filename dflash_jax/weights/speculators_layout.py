"""Drafters written in the layout of package speculators.

Tensors have the release's names, but for EAGLE-3's one layer, `layers.0`.
Nothing of the target is stored, as its reader takes that from the target that
config.json names; except the head's rows of a draft vocabulary, which lie
beside two maps, `d2t` and `t2d`. Source: speculators 0.9.0, model.py and
models/*/core.py (`_keys_to_ignore_on_save`).
"""

import os
import pathlib
from typing import Any

import numpy as np

from dflash_jax.config import DrafterConfig
from dflash_jax.networks import Eagle3Config
from dflash_jax.weights import (
  huggingface,
  names,
  quantization,
  safetensors_file,
)
from dflash_jax.weights.draft_vocabulary import check_vocabulary, maps_of
from dflash_jax.weights.drafter_names import drafter_table
from dflash_jax.weights.eagle3 import LAYER, eagle3_table, eagle3_tensors
from dflash_jax.weights.model_directory import write_model
from dflash_jax.weights.names import WeightsError
from dflash_jax.weights.speculators_config import (
  Serving,
  read_serving,
  read_type,
)
from dflash_jax.weights.speculators_fields import (
  block_fields,
  check_block_drafter,
  eagle3_layout_fields,
)

_HEAD = "lm_head.weight"


def read_speculators_serving(source: str | os.PathLike[str]) -> Serving:
  """What a directory says of its drafter's use; nothing in another layout.

  Args:
    source: a directory in any layout, or "owner/name" on the hub.

  Raises:
    WeightsError: another way to propose than one greedy chain.
  """
  directory = huggingface.find_directory(source)
  fields = huggingface.read_config_fields(directory)
  return Serving() if read_type(fields) is None else read_serving(fields)


def read_speculators_head(
  source: str | os.PathLike[str],
) -> np.ndarray | None:
  """f[V', D], the target's head for a draft vocabulary, as stored; or None.

  Only block drafters in this layout have one: it is no parameter of theirs, and
  the copy that another file should get.
  """
  directory = huggingface.find_directory(source)
  fields = huggingface.read_config_fields(directory)
  if read_type(fields) is None:
    return None
  tensors = safetensors_file.read_checkpoint(directory)
  if _HEAD not in tensors:
    return None
  return safetensors_file.weight(tensors, _HEAD)


def save_speculators(
  directory: str | os.PathLike[str],
  config: DrafterConfig | Eagle3Config,
  params: names.Params,
  serving: Serving,
  *,
  draft_vocabulary: np.ndarray | None = None,
  head: np.ndarray | None = None,
  dtype: str | None = "bfloat16",
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes a drafter in the speculators layout, whole or not at all.

  Args:
    directory: where; an earlier drafter there is replaced, but a directory
      with other files is refused.
    config: the drafter.
    params: its parameters, kernels also in 8 bits.
    serving: the target it is for.
    draft_vocabulary: i32[V'], sorted ids that a block drafter's head keeps;
      None for all. EAGLE-3's are among its parameters.
    head: f[V', D], the target's head for a draft vocabulary.
    dtype: on disk, "bfloat16" or "float32", of all that is not in 8 bits; None
      as `params` are.
    extra: JSON values to keep in config.json, see write_model.

  Raises:
    WeightsError: a drafter that the layout cannot say, a target without a
      name, parameters that are not this drafter's, or a failed write.
  """
  if not serving.verifier:
    raise WeightsError(
      "the speculators layout names the drafter's target, and none is known "
      "that other engines could load; name one in --verifier, a hub id or a "
      "directory in Hugging Face layout"
    )
  if isinstance(config, Eagle3Config):
    fields, tensors = _eagle3_files(config, params, serving, dtype)
  else:
    fields, tensors = _block_files(
      config, params, serving, draft_vocabulary, head, dtype
    )
  write_model(pathlib.Path(directory), fields, tensors, extra)


def _eagle3_files(
  config: Eagle3Config,
  params: names.Params,
  serving: Serving,
  dtype: str | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """config.json and tensors."""
  tensors = _rename(eagle3_tensors(config, params, dtype))
  fields = eagle3_layout_fields(config, names.main_dtype(tensors), serving)
  fields |= quantization.describe(_rename(eagle3_table(config)), tensors)
  if config.draft_vocab_size < config.vocab_size:
    tensors |= maps_of(np.asarray(params["head_ids"]), config.vocab_size)
  return fields, tensors


def _rename[T](by_name: dict[str, T]) -> dict[str, T]:
  """The same by the layout's names of EAGLE-3's tensors."""
  start = f"{LAYER}."
  return {
    "layers.0." + name.removeprefix(start)
    if name.startswith(start)
    else name: x
    for name, x in by_name.items()
  }


def _block_files(
  config: DrafterConfig,
  params: names.Params,
  serving: Serving,
  ids: np.ndarray | None,
  head: np.ndarray | None,
  dtype: str | None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """config.json and tensors."""
  if ids is not None:
    check_vocabulary(ids, config.vocab_size, "draft_vocabulary to save")
    if ids.size == config.vocab_size:
      ids = None
  columns = config.vocab_size if ids is None else ids.size
  check_block_drafter(config, columns)
  if serving.num_drafts > config.num_drafts:
    raise WeightsError(
      f"serving.num_drafts={serving.num_drafts}, but a block of "
      f"{config.block_size} drafts {config.num_drafts}; ask for no more"
    )
  table = drafter_table(config, columns)
  tensors = names.stored_tensors(table, params, dtype, source="params to save")
  main = names.main_dtype(tensors)
  fields = block_fields(config, columns, main, serving)
  fields |= quantization.describe(table, tensors)
  if ids is None:
    return fields, tensors
  expected = (columns, config.width)
  if head is None or head.shape != expected:
    raise WeightsError(
      f"the target's head for a draft vocabulary, {expected}, has to be in the "
      f"file, and {None if head is None else head.shape} was given; name the "
      "target's directory in --verifier"
    )
  stored = head if dtype is None else head.astype(names.parameter_dtype(dtype))
  tensors[_HEAD] = np.ascontiguousarray(stored)
  return fields, tensors | maps_of(ids, config.vocab_size)
