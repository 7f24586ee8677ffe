"""Drafters in the published layouts, read; and written in the first.

The first is that of the DFlash release (package dflash, Qwen3-style
config.json, tensors without prefix), which other engines read too; DSpark's and
Domino's are those of package specforge. A draft vocabulary lies beside the
weights in a file of its own, so that they can ignore it: tables with a row per
token always have all rows in the file, and in memory those of the vocabulary.
The other is that of package speculators, see speculators_layout.py. Tensors go
by the release's names in both, and config.json tells them apart.
"""

import os
import pathlib
import re
from typing import Any

import numpy as np

from dflash_jax.config import DrafterConfig
from dflash_jax.fp8 import Fp8Kernel
from dflash_jax.weights import (
  drafter_config,
  huggingface,
  names,
  quantization,
  safetensors_file,
  speculators_config,
)
from dflash_jax.weights.draft_vocabulary import (
  check_vocabulary,
  read_maps,
  read_vocabulary,
)
from dflash_jax.weights.drafter_config import DraftFields, drafter_fields
from dflash_jax.weights.drafter_names import (
  EXTRAS,
  SPECULATORS_EXTRAS,
  drafter_table,
  publish,
)
from dflash_jax.weights.fields import Fields
from dflash_jax.weights.model_directory import write_model
from dflash_jax.weights.names import WeightsError


def read_drafter_config(source: str | os.PathLike[str]) -> DrafterConfig:
  """The drafter that a directory describes; its weights are not read.

  Args:
    source: a directory in a published layout, or "owner/name" on the hub.

  Raises:
    WeightsError: another kind of drafter, or an incomplete checkpoint.
  """
  directory = huggingface.find_directory(source)
  return read_config(directory, read_tensors(directory))


def read_config(
  directory: pathlib.Path, tensors: safetensors_file.Tensors
) -> DrafterConfig:
  """The drafter that config.json describes, in either layout."""
  fields = huggingface.read_config_fields(directory)
  match kind := speculators_config.read_type(fields):
    case None:
      published: Fields = DraftFields.merge(fields)
    case speculators_config.EAGLE3:
      raise fields.refuse(speculators_config.TYPE, kind, "load it as EAGLE-3")
    case _:
      published = speculators_config.release_fields(fields)
  return drafter_config.read_config(directory, published, tensors)


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


def stored_table(
  fields: Fields, config: DrafterConfig
) -> tuple[names.Table, re.Pattern[str]]:
  """Every tensor of a file, and the names of others that may be there.

  Args:
    fields: config.json, which tells the layout.
    config: the drafter.
  """
  if speculators_config.read_type(fields) is None:
    return drafter_table(config), EXTRAS
  size = speculators_config.read_head_size(fields)
  if size > config.vocab_size:
    raise fields.refuse(
      "draft_vocab_size", size, f"at most {config.vocab_size}"
    )
  return drafter_table(config, size), SPECULATORS_EXTRAS


def read_ids(
  directory: pathlib.Path,
  tensors: safetensors_file.Tensors,
  config: DrafterConfig,
) -> np.ndarray | None:
  """The draft vocabulary i32[V'] of either layout; None for all tokens."""
  fields = huggingface.read_config_fields(directory)
  if speculators_config.read_type(fields) is None:
    return read_vocabulary(directory, config.vocab_size)
  size = speculators_config.read_head_size(fields)
  ids = read_maps(tensors, size, config.vocab_size, str(directory))
  if ids is not None:
    check_vocabulary(ids, config.vocab_size, f"{directory}, d2t")
  return ids


def load_drafter(
  source: str | os.PathLike[str], dtype: Any = "float32"
) -> tuple[DrafterConfig, names.Params, np.ndarray | None]:
  """A drafter, its parameters, and its draft vocabulary if it has one.

  Args:
    source: a directory in a published layout, or "owner/name" on the hub.
    dtype: of the parameters, float32 or bfloat16; None as they are stored.
      Kernels in 8 bits stay so.

  Returns:
    The config, the parameters, and the sorted token ids i32[V'] that the
    draft head keeps, or None for all. Tables with a row per column of the head
    have V' rows.

  Raises:
    WeightsError: another kind of drafter, or a damaged checkpoint.
  """
  directory = huggingface.find_directory(source)
  fields = huggingface.read_config_fields(directory)
  tensors = read_tensors(directory)
  config = read_config(directory, tensors)
  in_file, extras = stored_table(fields, config)
  stored = quantization.Weights.read(tensors, fields, in_file, publish)
  names.check_tensors(
    stored.shapes(), in_file, source=str(directory), extras=extras
  )
  ids = read_ids(directory, tensors, config)
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
  dtype: str | None = "bfloat16",
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes a drafter in the release's layout, whole or not at all.

  Args:
    directory: where; an earlier drafter there is replaced, but a directory
      with other files is refused.
    config: the drafter.
    params: its parameters, in any float dtype, kernels also in 8 bits.
    draft_vocabulary: i32[V'], sorted ids that its head keeps; None for all.
      What `params` lack of other tokens is zero in the file.
    dtype: on disk, "bfloat16" or "float32", of all that is not in 8 bits; None
      as `params` are.
    extra: JSON values to keep in config.json, see write_model.

  Raises:
    WeightsError: parameters that are not this drafter's, a depth of the target
      that is not known, or a failed write, after which the earlier drafter is
      still there.
  """
  if not config.num_target_layers:
    raise WeightsError(
      "num_target_layers is not known, and the release's layout has to say it; "
      "name the target's directory in --verifier"
    )
  ids = None
  if draft_vocabulary is not None:
    ids = np.asarray(draft_vocabulary)
    check_vocabulary(ids, config.vocab_size, "draft_vocabulary to save")
  table = drafter_table(config)
  tensors = names.stored_tensors(
    drafter_table(config, None if ids is None else ids.size),
    params,
    dtype,
    source="params to save",
  )
  for name, row in table.items():
    if (tensor := tensors[name]).shape != row.shape:
      tensors[name] = np.zeros(row.shape, tensor.dtype)
      tensors[name][ids] = tensor
  fields = drafter_fields(config, names.main_dtype(tensors))
  fields |= quantization.describe(table, tensors)
  write_model(directory, fields, tensors, extra, ids)
