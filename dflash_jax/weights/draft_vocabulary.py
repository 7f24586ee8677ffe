"""Draft vocabularies in files: ids that a trimmed head keeps.

Beside a drafter in the release's layout they lie in a file of their own.
EAGLE-3 and the speculators layout store two maps: `d2t` says how far each row
of the head lies from its token's id, `t2d` which ids are kept.
"""

import pathlib

import numpy as np

from dflash_jax.weights import safetensors_file
from dflash_jax.weights.model_directory import VOCABULARY_FILE
from dflash_jax.weights.names import WeightsError

_REMEDY = "fetch the drafter again"


def check_vocabulary(ids: np.ndarray, vocab_size: int, source: str) -> None:
  """Raises WeightsError unless ids are i32[V'] that rise."""
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
  """i32[V'], the ids in the file of a directory; None without one."""
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
  check_vocabulary(ids, vocab_size, str(path))
  return ids


def read_maps(
  tensors: safetensors_file.Tensors, size: int, vocab_size: int, source: str
) -> np.ndarray | None:
  """i32[V'], token id of each row of a head; None if rows are ids.

  Args:
    tensors: of the checkpoint.
    size: V', rows of the head.
    vocab_size: V.
    source: the checkpoint, for messages.

  Raises:
    WeightsError: maps that are missing, or that no head can have.
  """
  rows = np.arange(size, dtype=np.int64)
  offsets = tensors["d2t"].view() if "d2t" in tensors else np.zeros_like(rows)
  if offsets.shape != (size,) or offsets.dtype.kind not in "iu":
    raise WeightsError(
      f"{source}: d2t is {offsets.dtype}{list(offsets.shape)}, expected one "
      f"whole number for each of {size} rows of the head; {_REMEDY}"
    )
  if "d2t" not in tensors and size < vocab_size:
    raise WeightsError(
      f"{source}: d2t is missing, though the head has {size} rows for a "
      f"vocabulary of {vocab_size}; {_REMEDY}"
    )
  ids = rows + offsets.astype(np.int64)
  if ids.min() < 0 or ids.max() >= vocab_size or len(np.unique(ids)) < size:
    raise WeightsError(
      f"{source}: d2t leads to ids {ids.min()}..{ids.max()}, expected {size} "
      f"different ones of 0..{vocab_size - 1}; {_REMEDY}"
    )
  if size < vocab_size and "t2d" in tensors:
    kept = tensors["t2d"].view().astype(bool)
    if not np.array_equal(np.flatnonzero(kept), np.sort(ids)):
      raise WeightsError(
        f"{source}: d2t and t2d name different tokens; {_REMEDY}"
      )
  every = np.array_equal(ids, np.arange(vocab_size))
  return None if every else ids.astype(np.int32)


def maps_of(ids: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
  """The two maps of ids i[V']; see `read_maps`."""
  ids = np.asarray(ids, np.int64)
  return {
    "d2t": ids - np.arange(ids.size),
    "t2d": np.isin(np.arange(vocab_size), ids),
  }
