"""A corpus on disk: token shards with loss masks, and an index that vouches.

    index.json                 settings, files with checksums, totals
    prompts-00000.jsonl        prompts the target wrote itself
    shard-00000.safetensors    tokens, loss_mask, offsets, held_out
    held_out-NAME.jsonl        prompts of one source that training never sees

Every file is written whole or not at all, and counts only once the index names
it: a killed run leaves nothing half-written that could be read back.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from dflash_jax.config import ConfigError, TargetSource
from dflash_jax.target import Params
from train.files import FileError, read_json

FORMAT = 1
INDEX = "index.json"
BEGIN_AGAIN = "delete the corpus and run train.synthesize again"
SAMPLES = 16  # along each axis of an array, for the fingerprint of weights


class CorpusError(FileError):
  """A corpus that cannot be used; the message names file and remedy."""


def identify_target(source: TargetSource) -> Any:
  """What tells one target from another, as JSON."""
  if source.path:
    return source.path
  network = source.random and dataclasses.asdict(source.random)
  return {"random": network, "seed": source.seed}


def identify_weights(params: Params) -> str:
  """A fingerprint of a target's weights: a few hundred values of every array.

  Not of all their bytes, which would take as long as reading them: whatever was
  trained further, or rounded, differs nearly everywhere.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(_sample(params)):
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype}".encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()[:16]


@jax.jit
def _sample(params: Params) -> Params:
  """About SAMPLES evenly spread places along each axis of every array."""

  def places(leaf: jax.Array) -> jax.Array:
    steps = (max(1, size // SAMPLES) for size in leaf.shape)
    return leaf[tuple(slice(None, None, step) for step in steps)]

  return jax.tree.map(places, params)


class Corpus:
  """Examples of one or more corpus directories, in memory.

  Attributes:
    train, held_out: indices of each split's examples.
    checksum: tells corpora apart.
    targets: who answered, as identify_target says; one per directory.
  """

  def __init__(self, directories: Sequence[str]):
    """Reads and checks every shard.

    Raises:
      CorpusError: for a directory without corpus or a damaged shard.
    """
    if not directories:
      raise CorpusError(
        "no corpus given; set train.corpus to a directory that "
        "train.synthesize wrote"
      )
    indices = [read_index(pathlib.Path(path)) for path in directories]
    entries = [e["sha256"] for index in indices for e in index["shards"]]
    self.checksum = hashlib.sha256("".join(entries).encode()).hexdigest()
    self.targets = [index["settings"].get("target") for index in indices]
    shards = [
      shard
      for path, index in zip(directories, indices, strict=True)
      for shard in _read_shards(pathlib.Path(path), index)
    ]
    self._tokens = np.concatenate([s["tokens"] for s in shards])
    self._mask = np.concatenate([s["loss_mask"] for s in shards]) > 0
    lengths = np.concatenate([np.diff(s["offsets"]) for s in shards])
    self._offsets = np.concatenate([[0], np.cumsum(lengths)])
    held_out = np.concatenate([s["held_out"] for s in shards]) > 0
    self.train = np.flatnonzero(~held_out)
    self.held_out = np.flatnonzero(held_out)
    if not self.train.size:
      raise CorpusError(
        f"{', '.join(directories)}: no training sequences; answer more prompts "
        "or lower synthesis.held_out"
      )

  def __len__(self) -> int:
    return len(self._offsets) - 1

  @property
  def num_tokens(self) -> int:
    """Tokens of all examples."""
    return len(self._tokens)

  @property
  def lengths(self) -> np.ndarray:
    """i64[N], tokens of each example."""
    return np.diff(self._offsets)

  def span(self, index: int) -> slice:
    """Where an example's tokens lie among all tokens."""
    return slice(int(self._offsets[index]), int(self._offsets[index + 1]))

  def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens i32[T] and loss mask bool[T] of one example."""
    span = self.span(index)
    return self._tokens[span], self._mask[span]

  def check_vocabulary(self, vocab_size: int) -> None:
    """Raises CorpusError for a token that a target of vocab_size lacks."""
    lowest, highest = int(self._tokens.min()), int(self._tokens.max())
    if lowest < 0 or highest >= vocab_size:
      raise CorpusError(
        f"the corpus holds token {highest if lowest >= 0 else lowest}, but the "
        f"target's vocabulary is {vocab_size}; use a corpus that this target "
        "answered"
      )

  def check_anchors(self, num_anchors: int, length: int) -> None:
    """Refuses anchors that no training sequence has a place for.

    Sequences with fewer places leave some of their anchors out, as they must;
    anchors that all of them leave out are work for nothing.

    Args:
      num_anchors: A, of a sequence.
      length: S, tokens kept of each.

    Raises:
      ConfigError: naming both numbers.
    """
    owner = np.repeat(np.arange(len(self)), self.lengths)
    place = np.arange(self.num_tokens) - self._offsets[owner]
    # An anchor is supervised, and so is the token after it.
    is_anchor = self._mask[:-1] & self._mask[1:]
    is_anchor &= (place[1:] > 0) & (place[1:] < length)
    counts = np.bincount(owner[:-1][is_anchor], minlength=len(self))
    most = int(counts[self.train].max())
    if num_anchors > most:
      raise ConfigError(
        f"train.num_anchors={num_anchors} exceeds the supervised tokens of "
        f"every training sequence: the most anchors one can hold is {most}, "
        f"cut to train.sequence_length={length}; lower num_anchors or answer "
        "at greater length"
      )

  def frequent_tokens(self, count: int, vocab_size: int) -> np.ndarray:
    """i32[count], ids most frequent in training answers, sorted by id.

    Ties, unseen ids among them, go to the lower id.

    Raises:
      ConfigError: if count exceeds the vocabulary.
    """
    if count > vocab_size:
      raise ConfigError(
        f"drafter.draft_vocabulary={count} exceeds the target's vocabulary of "
        f"{vocab_size}; use 0 for all of it"
      )
    is_train = np.zeros((len(self),), bool)
    is_train[self.train] = True
    chosen = self._mask & np.repeat(is_train, self.lengths)
    seen = np.bincount(self._tokens[chosen], minlength=vocab_size)
    ranked = np.argsort(-seen, kind="stable")[:count]
    return np.sort(ranked).astype(np.int32)

  def train_indices(self, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Examples of one step, see `batch_order`."""
    return self.train[batch_order(step, batch_size, seed, len(self.train))]

  def batch(
    self, indices: np.ndarray, length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """tokens i32[B, length] and loss mask bool[B, length], cut or padded."""
    tokens = np.zeros((len(indices), length), np.int32)
    mask = np.zeros((len(indices), length), bool)
    for row, index in enumerate(indices):
      example_tokens, example_mask = self.example(index)
      kept = min(len(example_tokens), length)
      tokens[row, :kept] = example_tokens[:kept]
      mask[row, :kept] = example_mask[:kept]
    return tokens, mask


def batch_order(step: int, batch_size: int, seed: int, size: int) -> np.ndarray:
  """i64[batch_size]: which of `size` rows a step reads.

  A pure function, so a restart changes nothing. Every epoch is its own
  permutation.
  """
  places = range(step * batch_size, (step + 1) * batch_size)
  return np.array(
    [_epoch_order(seed, place // size, size)[place % size] for place in places]
  )


def spread(indices: np.ndarray, count: int) -> np.ndarray:
  """At most count of the indices, evenly: of each corpus, its share."""
  if len(indices) <= count:
    return indices
  return indices[np.arange(count) * len(indices) // count]


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(size)


def read_index(directory: pathlib.Path) -> dict[str, Any]:
  """The index of a corpus.

  Raises:
    CorpusError: if there is none, or of another format.
    FileError: if it is damaged.
  """
  path = directory / INDEX
  if not path.is_file():
    raise CorpusError(
      f"{directory} holds no corpus (no {INDEX}); run "
      "python -m train.synthesize first"
    )
  index = read_json(path, BEGIN_AGAIN)
  if index.get("format") != FORMAT:
    raise CorpusError(
      f"{path} has format {index.get('format')!r}, not {FORMAT}; {BEGIN_AGAIN}"
    )
  is_sound = (
    isinstance(index.get("settings"), dict)
    and isinstance(index.get("complete"), bool)
    and all(
      isinstance(index.get(kind), list) and all(map(_is_entry, index[kind]))
      for kind in ("prompts", "shards")
    )
  )
  if not is_sound:
    raise CorpusError(f"{path} is damaged (missing fields); {BEGIN_AGAIN}")
  return index


def _is_entry(entry: Any) -> bool:
  if not isinstance(entry, dict):
    return False
  name, checksum = entry.get("file"), entry.get("sha256")
  if not isinstance(name, str) or not isinstance(checksum, str):
    return False
  return name == pathlib.PurePath(name).name


def read_checked(directory: pathlib.Path, entry: dict[str, Any]) -> bytes:
  """A file the index names, if its checksum holds.

  Raises:
    CorpusError: if it is missing or damaged, by name.
  """
  path = directory / entry["file"]
  if not path.is_file():
    raise CorpusError(f"{path} is missing; {BEGIN_AGAIN}")
  data = path.read_bytes()
  if hashlib.sha256(data).hexdigest() != entry["sha256"]:
    raise CorpusError(
      f"{path} does not match its checksum in {INDEX}; {BEGIN_AGAIN}"
    )
  return data


def _read_shards(
  directory: pathlib.Path, index: dict[str, Any]
) -> list[dict[str, np.ndarray]]:
  if not index["shards"]:
    raise CorpusError(f"{directory} has no shard yet; let train.synthesize run")
  if not index["complete"]:
    logging.warning(
      "%s is not complete: training on its first %d shards",
      directory,
      len(index["shards"]),
    )
  return [_read_shard(directory, entry) for entry in index["shards"]]


def _read_shard(
  directory: pathlib.Path, entry: dict[str, Any]
) -> dict[str, np.ndarray]:
  data = read_checked(directory, entry)
  path = directory / entry["file"]
  try:
    shard = safetensors.numpy.load(data)
    tokens, offsets = shard["tokens"], shard["offsets"]
    is_sound = (
      tokens.dtype == np.int32
      and tokens.ndim == 1
      and shard["loss_mask"].shape == tokens.shape
      and offsets.dtype == np.int64
      and shard["held_out"].shape == (len(offsets) - 1,)
      and offsets[0] == 0
      and offsets[-1] == len(tokens)
      and bool((np.diff(offsets) > 0).all())
    )
  except (safetensors.SafetensorError, KeyError) as error:
    raise CorpusError(f"{path} is no shard ({error}); {BEGIN_AGAIN}") from (
      error
    )
  if not is_sound:
    raise CorpusError(f"{path} contradicts itself; {BEGIN_AGAIN}")
  return shard
