"""A network in a directory: config.json, its tensors, and what lies beside."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from dflash_jax.weights import safetensors_file
from dflash_jax.weights.atomic import replace_directory

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
VOCABULARY_FILE = "draft_vocabulary.safetensors"
CARD_FILE = "README.md"
# In a card that may be replaced, because train.export made it.
CARD_MARK = "<!-- Made by train.export, which writes it anew. -->"
_FILES = frozenset({WEIGHTS_FILE, CONFIG_FILE, VOCABULARY_FILE})

Tensors = Mapping[str, np.ndarray]


def write_model(
  directory: str | os.PathLike[str],
  fields: Mapping[str, Any],
  tensors: Tensors,
  extra: dict[str, Any] | None = None,
  vocabulary: np.ndarray | None = None,
) -> None:
  """Writes a network, whole or not at all.

  Args:
    directory: where; an earlier network there is replaced, but a directory with
      other files is refused.
    fields: of config.json.
    tensors: by their published names.
    extra: JSON values to keep in config.json, under "dflash_jax"; not read
      back.
    vocabulary: i32[V'], ids that a trimmed head keeps, in a file of their own.

  Raises:
    WeightsError: a failed write, after which what was there still is.
  """
  if extra is not None:
    fields = {**fields, "dflash_jax": extra}
  text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
  files: dict[str, Tensors] = {WEIGHTS_FILE: tensors}
  if vocabulary is not None:
    files[VOCABULARY_FILE] = {"ids": vocabulary}
  with replace_directory(
    pathlib.Path(directory), _replaceable(pathlib.Path(directory))
  ) as temporary:
    for name, arrays in files.items():
      with temporary.open(name) as file:
        safetensors_file.write_safetensors(file, arrays)
    with temporary.open(CONFIG_FILE) as file:
      file.write(text.encode())


def _replaceable(directory: pathlib.Path) -> frozenset[str]:
  """Files that a directory may hold and lose: a card only if it was made."""
  try:
    is_made = CARD_MARK in (directory / CARD_FILE).read_text(encoding="utf-8")
  except (OSError, ValueError):
    return _FILES
  return _FILES | {CARD_FILE} if is_made else _FILES
