"""Target features on disk, computed once and read every epoch.

Worth its bytes where the target is slow and the corpus small (a CPU); online
features cost no disk and are the default. One row a token, half precision:

    meta.json      what the rows are, and how many examples are done
    features.f16   f16[tokens, taps * D], in corpus order
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging

from dflash_jax.generate import bucket
from dflash_jax.target import Params, Target
from train.corpus import Corpus, CorpusError, write_whole

BATCH = 32  # sequences per target pass
LARGEST = float(np.finfo(np.float16).max)


class FeatureCache:
  """Taps of every token of a corpus, memory-mapped.

  A killed build resumes at its last finished batch; rows beyond it are never
  read.
  """

  def __init__(
    self, directory: str, corpus: Corpus, taps: tuple[int, ...], width: int
  ):
    """Opens or creates the cache of `corpus`.

    Args:
      directory: of the cache.
      corpus: what it caches, told apart by its checksums.
      taps: tapped layers.
      width: taps * D.

    Raises:
      CorpusError: if it was made from another corpus or other taps.
    """
    self.directory = pathlib.Path(directory)
    self._corpus = corpus
    self._taps = taps
    self._width = width
    identity = {
      "corpus": corpus.checksum,
      "taps": list(taps),
      "width": width,
      "tokens": corpus.num_tokens,
    }
    path = self.directory / "meta.json"
    fresh = {"identity": identity, "examples": 0}
    self._meta: dict[str, Any] = (
      json.loads(path.read_text()) if path.exists() else fresh
    )
    if self._meta["identity"] != identity:
      raise CorpusError(
        f"{directory} caches other features (see its meta.json); choose "
        "another train.feature_cache or delete it"
      )
    self.directory.mkdir(parents=True, exist_ok=True)
    shape = (corpus.num_tokens, width)
    rows_path = self.directory / "features.f16"
    size = shape[0] * shape[1] * 2
    exists = rows_path.exists() and rows_path.stat().st_size == size
    if self._meta["examples"] and not exists:
      raise CorpusError(
        f"{rows_path} is missing or truncated; delete {directory} and start "
        "again"
      )
    logging.info("feature cache %s: %.2f GB", directory, size / 1e9)
    self._rows = np.memmap(
      rows_path, np.float16, "r+" if exists else "w+", shape=shape
    )

  @property
  def is_complete(self) -> bool:
    """Whether every example has been computed."""
    return self._meta["examples"] == len(self._corpus)

  def build(self, target: Target, params: Params) -> None:
    """Computes what is missing, longest examples first.

    Raises:
      CorpusError: if the disk refuses or a feature does not fit half precision.
    """
    lengths = self._corpus.lengths
    order = np.argsort(-lengths, kind="stable")
    run = jax.jit(_tap, static_argnums=(0, 3))
    done = self._meta["examples"]
    with tqdm.tqdm(total=len(order), initial=done, desc="features") as bar:
      for first in range(done, len(order), BATCH):
        part = order[first : first + BATCH]
        longest = int(lengths[part].max())
        padded = min(bucket(longest, 1 << 30), -(-longest // 64) * 64)
        tokens, _ = self._corpus.batch(part, padded)
        full = np.zeros((BATCH, padded), np.int32)
        full[: len(part)] = tokens
        taps = np.asarray(run(target, params, full, self._taps))
        for row, index in enumerate(part):
          self._rows[self._corpus.span(index)] = _half(
            taps[row, : lengths[index]]
          )
        bar.update(len(part))
        if (first // BATCH) % 16 == 15:
          self._save_progress(first + len(part))
    self._save_progress(len(order))

  def batch(self, indices: np.ndarray, length: int) -> np.ndarray:
    """f16[B, length, taps * D], cut or padded like Corpus.batch."""
    taps = np.zeros((len(indices), length, self._width), np.float16)
    for row, index in enumerate(indices):
      rows = self._rows[self._corpus.span(index)][:length]
      taps[row, : len(rows)] = rows
    return taps

  def _save_progress(self, examples: int) -> None:
    self._rows.flush()
    self._meta["examples"] = examples
    write_whole(
      self.directory / "meta.json", json.dumps(self._meta, indent=1).encode()
    )


def _tap(target: Target, params: Params, tokens: jax.Array, taps) -> jax.Array:
  """tokens i32[B, S] -> f32[B, S, taps * D]."""
  cache = target.init_cache(*tokens.shape, params["embedding"].dtype)
  return target.forward(params, tokens, cache, taps)[1]


def _half(rows: np.ndarray) -> np.ndarray:
  if not np.abs(rows).max() < LARGEST:
    raise CorpusError(
      f"a feature of size {np.abs(rows).max():.3g} does not fit half precision; "
      "train with online features (train.feature_cache='')"
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
