"""Drafters in the published layout, read and written.

The layout is that of the DFlash release (package dflash, Qwen3-style
config.json, tensors without prefix), which other engines read too; DSpark's and
Domino's are those of package specforge. A draft vocabulary lies beside the
weights in a file of its own, so that they can ignore it: tables with a row per
token always have all rows in the file, and in memory those of the vocabulary.
"""

import os
import pathlib
from typing import Any

import numpy as np

from dflash_jax.config import DrafterConfig
from dflash_jax.fp8 import Fp8Kernel
from dflash_jax.weights import (
  huggingface,
  names,
  quantization,
  safetensors_file,
)
from dflash_jax.weights.drafter_config import drafter_fields, read_config
from dflash_jax.weights.drafter_names import EXTRAS, drafter_table, publish
from dflash_jax.weights.model_directory import VOCABULARY_FILE, write_model
from dflash_jax.weights.names import WeightsError


def read_drafter_config(source: str | os.PathLike[str]) -> DrafterConfig:
  """The drafter that a directory describes; its weights are not read.

  Args:
    source: a directory in the published layout, or "owner/name" on the hub.

  Raises:
    WeightsError: another kind of drafter, or an incomplete checkpoint.
  """
  directory = huggingface.find_directory(source)
  return read_config(directory, read_tensors(directory))


def read_tensors(
  directory: pathlib.Path, on_error: names.OnError = names.give_up
) -> safetensors_file.Tensors:
  """The stored tensors, by their published names.

  `on_error` is as in `safetensors_file.read_safetensors`.
  """
  stored = safetensors_file.read_checkpoint(directory, on_error)
  tensors: safetensors_file.Tensors = {}
  for name, tensor in stored.items():
    published = publish(name)
    if published in tensors:
      on_error(
        WeightsError(
          f"{tensor.path}: holds {published} twice, once as {name}; keep one"
        )
      )
    tensors[published] = tensor
  return tensors


def _check_vocabulary(ids: np.ndarray, vocab_size: int, source: str) -> None:
  sound = (
    ids.ndim == 1
    and ids.size > 0
    and ids.dtype == np.int32
    and ids[0] >= 0
    and ids[-1] < vocab_size
    and bool(np.all(np.diff(ids.astype(np.int64)) > 0))
  )
  if not sound:
    raise WeightsError(
      f"{source}: ids ({ids.dtype} of shape {ids.shape}) are not a draft "
      f"vocabulary, int32 ids that rise from 0 to at most {vocab_size - 1} "
      "without repeats; choose it again from the corpus"
    )


def read_vocabulary(
  directory: pathlib.Path, vocab_size: int
) -> np.ndarray | None:
  """The draft vocabulary i32[V'] beside a drafter of `vocab_size` tokens."""
  path = directory / VOCABULARY_FILE
  if not path.exists():
    return None
  tensors = safetensors_file.read_safetensors(path)
  if tensors.keys() != {"ids"}:
    raise WeightsError(
      f"{path}: holds {sorted(tensors)}, expected the one tensor ids; write "
      "the drafter again"
    )
  ids = tensors["ids"].view().copy()
  _check_vocabulary(ids, vocab_size, str(path))
  return ids


def load_drafter(
  source: str | os.PathLike[str], dtype: Any = "float32"
) -> tuple[DrafterConfig, names.Params, np.ndarray | None]:
  """A drafter, its parameters, and its draft vocabulary if it has one.

  Args:
    source: a directory in the published layout, or "owner/name" on the hub.
    dtype: of the parameters, float32 or bfloat16; kernels in 8 bits stay so.

  Returns:
    The config, the parameters, and the sorted token ids i32[V'] that the
    draft head keeps, or None for all. Tables with a row per column of the head
    have V' rows.

  Raises:
    WeightsError: another kind of drafter, or a damaged checkpoint.
  """
  directory = huggingface.find_directory(source)
  tensors = read_tensors(directory)
  config = read_config(directory, tensors)
  table = drafter_table(config)
  stored = quantization.Weights.read(
    tensors, huggingface.read_config_fields(directory), table
  )
  names.check_tensors(
    stored.shapes(), table, source=str(directory), extras=EXTRAS
  )
  ids = read_vocabulary(directory, config.vocab_size)
  table = drafter_table(config, None if ids is None else ids.size)

  def fetch(name: str) -> np.ndarray | Fp8Kernel:
    found = stored.fetch(name)
    if isinstance(found, Fp8Kernel) or found.shape == table[name].shape:
      return found
    return found[ids]

  return config, names.build_tree(table, fetch, dtype), ids


def save_drafter(
  directory: str | os.PathLike[str],
  config: DrafterConfig,
  params: names.Params,
  *,
  draft_vocabulary: np.ndarray | None = None,
  dtype: str = "bfloat16",
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes a drafter in the published layout, whole or not at all.

  Args:
    directory: where; an earlier drafter there is replaced, but a directory
      with other files is refused.
    config: the drafter.
    params: its parameters, in any float dtype, kernels also in 8 bits.
    draft_vocabulary: i32[V'], sorted ids that its head keeps; None for all.
      What `params` lack of other tokens is zero in the file.
    dtype: on disk, "bfloat16" or "float32", of all that is not in 8 bits.
    extra: JSON values to keep in config.json, see write_model.

  Raises:
    WeightsError: parameters that are not this drafter's, or a failed write,
      after which the earlier drafter is still there.
  """
  disk_dtype = names.parameter_dtype(dtype)
  ids = None
  if draft_vocabulary is not None:
    ids = np.asarray(draft_vocabulary)
    _check_vocabulary(ids, config.vocab_size, "draft_vocabulary to save")
  table = drafter_table(config)
  tensors = names.stored_tensors(
    drafter_table(config, None if ids is None else ids.size),
    params,
    disk_dtype,
    source="params to save",
  )
  for name, row in table.items():
    if (tensor := tensors[name]).shape != row.shape:
      tensors[name] = np.zeros(row.shape, disk_dtype)
      tensors[name][ids] = tensor
  fields = drafter_fields(config, disk_dtype.name)
  fields |= quantization.describe(table, tensors)
  write_model(directory, fields, tensors, extra, ids)
