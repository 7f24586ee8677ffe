"""Target features on disk, computed once and read every epoch.

Worth its bytes where the target is slow and the corpus small (a CPU); online
features cost no disk and are the default. One row a token, half precision:

    meta.json      what the rows are features of
    features.f16   f16[tokens, taps * D], in corpus order
    done.u64       u64[examples], 0 until an example's rows are on the disk,
                   then 2**32 + their crc32

All of it is computed before the first step (`build`), or each example as it is
first read (`fill`): the hybrid of cached and online features. An example is
marked done after its rows have reached the disk, so a killed run leaves nothing
half-written that counts. Rows are checked as a process first reads them, at the
speed of a crc32: a quarter of a millisecond for an example of 1.7 MB.
"""

import json
import os
import pathlib
import shutil
import threading
import zlib
from collections.abc import Sequence
from typing import Any, Literal

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

FORMAT = 2
BATCH = 32  # sequences per target pass of a build
SAVE_EVERY = 16  # passes of a build between records of progress
LARGEST = float(np.finfo(np.float16).max)
_META, _ROWS, _DONE = "meta.json", "features.f16", "done.u64"
_MARK = np.uint64(1 << 32)


class FeatureCache:
  """Taps of every token of a corpus, on disk. Threads may share it."""

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
      corpus: what it caches, told apart by the checksums of its tokens, which
        the chat template is part of.
      taps: layers that will be read, each once. A cache that holds more than
        these is read in part; a new one holds these.
      width: taps * D.
      source: JSON that tells apart the targets and their precisions.

    Raises:
      FileError: if it was made from something else, is damaged, or does not fit
        on the disk.
    """
    self.directory = pathlib.Path(directory)
    self._corpus = corpus
    self._taps = self._held_taps() or taps
    if not set(taps) <= set(self._taps):
      self._taps = taps  # which the identity below refuses
    depth = width // len(taps)
    self._width = len(self._taps) * depth
    self._columns = np.concatenate(
      [self._taps.index(tap) * depth + np.arange(depth) for tap in taps]
    )
    is_whole = self._taps == tuple(taps)
    self._read = slice(None) if is_whole else self._columns
    self._lock = threading.Lock()
    self._open(
      {
        "format": FORMAT,
        "corpus": corpus.checksum,
        "taps": list(self._taps),
        "width": self._width,
        "tokens": corpus.num_tokens,
        **source,
      }
    )
    self._rows = np.memmap(
      self.directory / _ROWS,
      np.float16,
      "r",
      shape=(corpus.num_tokens, self._width),
    )
    self._is_checked = np.zeros((len(corpus),), bool)

  @property
  def num_bytes(self) -> int:
    """Size of the rows of the whole corpus."""
    return self._corpus.num_tokens * self._width * 2

  @property
  def is_complete(self) -> bool:
    """Whether every example has been computed."""
    return bool(self._done.all())

  def build(self, target: Target, params: Params) -> None:
    """Computes what is missing of the corpus, longest examples first.

    Raises:
      FileError: if the disk refuses or a feature does not fit half precision.
    """
    if self.is_complete:
      return
    _reserve(self.directory / _ROWS, self.num_bytes)
    lengths = self._corpus.lengths
    order = np.argsort(-lengths, kind="stable")
    with tqdm.tqdm(
      total=self._corpus.num_tokens,
      initial=int(lengths[self._done > 0].sum()),
      desc="features",
      unit="token",
      unit_scale=True,
    ) as bar:
      marks: dict[int, np.uint64] = {}
      # Always the same examples together, so that a build that was killed ends
      # in the bits of one that was not.
      for count, first in enumerate(range(0, len(order), BATCH), start=1):
        group = order[first : first + BATCH]
        missing = group[self._done[group] == 0]
        if missing.size:
          marks |= self._compute(target, params, group, BATCH)
          bar.update(int(lengths[missing].sum()))
        if count % SAVE_EVERY == 0:
          self._record(marks)
          marks = {}
      self._record(marks)

  def fill(
    self, target: Target, params: Params, indices: Sequence[int] | np.ndarray
  ) -> None:
    """Computes those of these examples that are missing, and keeps them.

    One by one: what an example's features are does not depend on the batch that
    asked for them first.

    Raises:
      FileError: as `build`.
    """
    with self._lock:
      marks: dict[int, np.uint64] = {}
      for index in np.unique(np.asarray(indices, np.int64)):
        if not self._done[index]:
          marks |= self._compute(target, params, np.array([index]), 1)
      self._record(marks)

  def batch(self, indices: np.ndarray, length: int) -> np.ndarray:
    """f16[B, length, taps * D], cut or padded like Corpus.batch.

    Raises:
      FileError: if an example has not been computed, or is damaged.
    """
    taps = np.zeros((len(indices), length, len(self._columns)), np.float16)
    for row, index in enumerate(indices):
      rows = self._rows[self._corpus.span(index)]
      if not self._is_checked[index]:
        self._check(int(index), rows)
      taps[row, : min(len(rows), length)] = rows[:length, self._read]
    return taps

  def _compute(
    self, target: Target, params: Params, group: np.ndarray, size: int
  ) -> dict[int, np.uint64]:
    """Writes the rows that a group of at most `size` examples lacks.

    Returns:
      Their marks, for when the rows are on the disk.
    """
    lengths = self._corpus.lengths[group]
    longest = int(lengths.max())
    # Powers of two up to 64, then multiples: few compilations, little padding.
    padded = min(bucket(longest, 1 << 30), -(-longest // 64) * 64)
    tokens = np.zeros((size, padded), np.int32)
    tokens[: len(group)], _ = self._corpus.batch(group, padded)
    taps = np.asarray(_tap(target, params, tokens, self._taps))
    marks = {}
    for row, (index, length) in enumerate(zip(group, lengths, strict=True)):
      if self._done[index]:
        continue
      rows = _half(taps[row, :length])
      self._write(self._corpus.span(index).start, rows.tobytes())
      marks[int(index)] = _MARK + np.uint64(zlib.crc32(rows))
    return marks

  def _write(self, first: int, data: bytes) -> None:
    """Writes rows from number `first` on."""
    path = self.directory / _ROWS
    try:
      with path.open("r+b") as file:
        file.seek(first * self._width * 2)
        file.write(data)
    except OSError as error:
      raise cannot_write(path, error) from error

  def _record(self, marks: dict[int, np.uint64]) -> None:
    """Marks examples as done, once their rows have reached the disk."""
    if not marks:
      return
    try:
      with (self.directory / _ROWS).open("r+b") as file:
        os.fsync(file.fileno())
    except OSError as error:
      raise cannot_write(self.directory / _ROWS, error) from error
    self._done[list(marks)] = list(marks.values())
    self._done.flush()

  def _check(self, index: int, rows: np.ndarray) -> None:
    """Raises FileError unless the rows of an example are those it was given."""
    if not self._done[index]:
      raise FileError(
        f"{self.directory} lacks the features of example {index}; compute them "
        "with train.hybrid_features=False"
      )
    if self._done[index] != _MARK + np.uint64(zlib.crc32(rows)):
      raise FileError(
        f"{self.directory / _ROWS} is damaged: example {index} does not match "
        f"its checksum in {_DONE}; delete {self.directory} and start again"
      )
    self._is_checked[index] = True

  # --- Opening ----------------------------------------------------------------

  def _held_taps(self) -> tuple[int, ...]:
    """Layers that the cache holds, if there is one."""
    path = self.directory / _META
    if not path.exists():
      return ()
    meta = read_json(path, f"delete {self.directory} and start again")
    taps: Any = meta.get("taps")
    is_list = isinstance(taps, list) and all(isinstance(t, int) for t in taps)
    return tuple(taps) if is_list else ()

  def _open(self, identity: dict[str, Any]) -> None:
    """Sees that all three files are there and belong together."""
    if (self.directory / _META).exists():
      self._check_identity(identity)
    if not (self.directory / _DONE).exists():
      self._create(identity)
    rows, size = self.directory / _ROWS, self.num_bytes
    done, count = self.directory / _DONE, len(self._corpus)
    for path, expected in ((rows, size), (done, count * 8)):
      if not path.exists() or path.stat().st_size != expected:
        raise FileError(
          f"{path} is missing or truncated; delete {self.directory} and start "
          "again"
        )
    mode: Literal["r", "r+"] = "r+" if os.access(done, os.W_OK) else "r"
    self._done = np.memmap(done, np.uint64, mode, shape=(count,))

  def _create(self, identity: dict[str, Any]) -> None:
    """Makes files without features, the one that makes them count last."""
    free = shutil.disk_usage(_existing(self.directory)).free
    logging.info(
      "feature cache %s: %d tokens x %d values x 2 bytes = %.2f GB, of %.1f GB "
      "free",
      self.directory,
      self._corpus.num_tokens,
      self._width,
      self.num_bytes / 1e9,
      free / 1e9,
    )
    make_directory(self.directory)
    text = json.dumps(identity, indent=1)
    write_whole(self.directory / _META, text.encode())
    path = self.directory / _ROWS
    try:
      with path.open("wb") as file:
        file.truncate(self.num_bytes)
    except OSError as error:
      path.unlink(missing_ok=True)
      raise cannot_write(path, error) from error
    write_whole(self.directory / _DONE, bytes(8 * len(self._corpus)))

  def _check_identity(self, identity: dict[str, Any]) -> None:
    identity = json.loads(json.dumps(identity))  # a tuple is read as a list
    found = read_json(
      self.directory / _META, f"delete {self.directory} and start again"
    )
    differences = [
      f"{name} {found.get(name)!r}, now {identity.get(name)!r}"
      for name in sorted(identity.keys() | found.keys())
      if found.get(name) != identity.get(name)
    ]
    if differences:
      raise FileError(
        f"{self.directory} caches other features ({'; '.join(differences)}); "
        "choose another train.feature_cache or delete it"
      )


def _existing(path: pathlib.Path) -> pathlib.Path:
  """The path, or of its parents the nearest that is there."""
  return next(p for p in (path, *path.absolute().parents) if p.exists())


def _reserve(path: pathlib.Path, size: int) -> None:
  """Takes the disk space now, before the work; what was written stays."""
  missing = size - path.stat().st_blocks * 512
  free = shutil.disk_usage(path).free
  if missing > free:
    raise FileError(
      f"{path} needs {missing / 1e9:.2f} GB more, and its disk has "
      f"{free / 1e9:.2f} GB free; free space, choose another "
      "train.feature_cache, or train with online features"
    )
  try:
    with path.open("r+b") as file:
      os.posix_fallocate(file.fileno(), 0, size)
  except OSError as error:
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
