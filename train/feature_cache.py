"""Target features on disk, computed once and read every epoch.

Worth its bytes where the target is slow and the corpus small (a CPU); online
features cost no disk and are the default. One row a token, half precision:

    meta.json      what the rows are, and how many examples are done
    features.f16   f16[tokens, taps * D], in corpus order
"""

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging

from dflash_jax.session import bucket
from dflash_jax.target import Params, Target
from train.corpus import Corpus
from train.files import (
  FileError,
  cannot_write,
  make_directory,
  read_json,
  write_whole,
)

BATCH = 32  # sequences per target pass
SAVE_EVERY = 16  # passes between records of progress
LARGEST = float(np.finfo(np.float16).max)
_META = "meta.json"
_ROWS = "features.f16"


class FeatureCache:
  """Taps of every token of a corpus, memory-mapped.

  A killed build resumes at its last recorded batch; rows beyond it are never
  read.
  """

  def __init__(
    self,
    directory: str,
    corpus: Corpus,
    taps: tuple[int, ...],
    width: int,
    source: dict[str, Any],
  ):
    """Opens or creates the cache of `corpus`.

    Args:
      directory: of the cache.
      corpus: what it caches, told apart by its checksums.
      taps: tapped layers.
      width: taps * D.
      source: JSON that tells apart the targets and their precisions.

    Raises:
      FileError: if it was made from something else, is damaged, or does not fit
        on the disk.
    """
    self.directory = make_directory(directory)
    self._corpus = corpus
    self._taps = taps
    self._width = width
    identity = {
      "corpus": corpus.checksum,
      "taps": list(taps),
      "width": width,
      "tokens": corpus.num_tokens,
      **source,
    }
    self._meta = self._read_meta(identity)
    self._rows = self._map_rows()

  @property
  def is_complete(self) -> bool:
    """Whether every example has been computed."""
    return self._meta["examples"] == len(self._corpus)

  def build(self, target: Target, params: Params) -> None:
    """Computes what is missing, longest examples first.

    Raises:
      FileError: if the disk refuses or a feature does not fit half precision.
    """
    lengths = self._corpus.lengths
    order = np.argsort(-lengths, kind="stable")
    done = self._meta["examples"]
    with tqdm.tqdm(
      total=self._corpus.num_tokens,
      initial=int(lengths[order[:done]].sum()),
      desc="features",
      unit="token",
      unit_scale=True,
    ) as bar:
      for count, first in enumerate(range(done, len(order), BATCH), start=1):
        part = order[first : first + BATCH]
        self._compute(target, params, part)
        bar.update(int(lengths[part].sum()))
        if count % SAVE_EVERY == 0:
          self._save_progress(first + len(part))
    self._save_progress(len(order))

  def batch(self, indices: np.ndarray, length: int) -> np.ndarray:
    """f16[B, length, taps * D], cut or padded like Corpus.batch."""
    taps = np.zeros((len(indices), length, self._width), np.float16)
    for row, index in enumerate(indices):
      rows = self._rows[self._corpus.span(index)][:length]
      taps[row, : len(rows)] = rows
    return taps

  def _compute(self, target: Target, params: Params, part: np.ndarray) -> None:
    """Fills the rows of at most BATCH examples."""
    lengths = self._corpus.lengths[part]
    longest = int(lengths.max())
    # Powers of two up to 64, then multiples: few compilations, little padding.
    padded = min(bucket(longest, 1 << 30), -(-longest // 64) * 64)
    tokens = np.zeros((BATCH, padded), np.int32)
    tokens[: len(part)], _ = self._corpus.batch(part, padded)
    taps = np.asarray(_tap(target, params, tokens, self._taps))
    for row, (index, length) in enumerate(zip(part, lengths, strict=True)):
      self._rows[self._corpus.span(index)] = _half(taps[row, :length])

  def _read_meta(self, identity: dict[str, Any]) -> dict[str, Any]:
    path = self.directory / _META
    if not path.exists():
      return {"identity": identity, "examples": 0}
    meta = read_json(path, f"delete {self.directory} and start again")
    if meta.get("identity") != identity:
      raise FileError(
        f"{self.directory} caches other features (see its {_META}); choose "
        "another train.feature_cache or delete it"
      )
    return meta

  def _map_rows(self) -> np.memmap:
    path = self.directory / _ROWS
    shape = (self._corpus.num_tokens, self._width)
    size = shape[0] * shape[1] * np.dtype(np.float16).itemsize
    if not path.exists() or path.stat().st_size != size:
      if self._meta["examples"]:
        raise FileError(
          f"{path} is missing or truncated; delete {self.directory} and start "
          "again"
        )
      _reserve(path, size)
      logging.info("feature cache %s: %.2f GB", self.directory, size / 1e9)
    return np.memmap(path, np.float16, "r+", shape=shape)

  def _save_progress(self, examples: int) -> None:
    self._rows.flush()
    self._meta["examples"] = examples
    write_whole(
      self.directory / _META, json.dumps(self._meta, indent=1).encode()
    )


def _reserve(path: pathlib.Path, size: int) -> None:
  """Takes the disk space now: a mapped page without any kills the process."""
  try:
    with path.open("wb") as file:
      os.posix_fallocate(file.fileno(), 0, size)
  except OSError as error:
    path.unlink(missing_ok=True)
    raise cannot_write(path, error) from error


def _forward(
  target: Target, params: Params, tokens: jax.Array, taps: tuple[int, ...]
) -> jax.Array:
  B, _ = tokens.shape
  cache = target.init_cache(B, 0, params["embedding"].dtype)
  return target.forward(params, tokens, cache, taps)[1]


# (target, params, tokens i32[B, S], taps) -> f32[B, S, taps * D]
_tap = jax.jit(_forward, static_argnums=(0, 3))


def _half(rows: np.ndarray) -> np.ndarray:
  largest = np.abs(rows).max()
  if not largest < LARGEST:  # not a number, too
    raise FileError(
      f"a feature of size {largest:.3g} does not fit half precision; train "
      "with online features (train.feature_cache='')"
    )
  return rows.astype(np.float16)


def measure_tap_scale(taps: np.ndarray, valid: np.ndarray) -> np.ndarray:
  """f32[taps * D]: one over each channel's usual size.

  The median, not the root mean square: a target's first token carries a few
  values thousands of times the usual, which would silence their channels.

  Args:
    taps: f[B, S, taps * D].
    valid: bool[B, S], real tokens.
  """
  typical = np.median(np.abs(taps[valid].astype(np.float32)), axis=0)
  return 1.0 / np.maximum(1.4826 * typical, 1e-3).astype(np.float32)
