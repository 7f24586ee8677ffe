"""A corpus on disk: token shards with loss masks, and an index that vouches.

    index.json                 settings, files with checksums, totals
    prompts-00000.jsonl        prompts the target wrote itself
    shard-00000.safetensors    tokens, loss_mask, offsets, held_out
    held_out-NAME.jsonl        prompts of one source that training never sees

Every file is written whole or not at all, and counts only once the index names
it: a killed run leaves nothing half-written that could be read back.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from dflash_jax.config import ConfigError, TargetSource
from train.files import FileError, make_directory, read_json, write_whole

FORMAT = 1
_INDEX = "index.json"
_BEGIN_AGAIN = "delete the corpus and run train.synthesize again"


class CorpusError(FileError):
  """A corpus that cannot be used; the message names file and remedy."""


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt and the target's answer.

  Attributes:
    tokens: i32[T], prompt then answer.
    prompt_length: tokens of the prompt; the answer's are supervised.
    held_out: kept for evaluation.
  """

  tokens: np.ndarray
  prompt_length: int
  held_out: bool


def is_held_out(prompt: str, share: float) -> bool:
  """Whether a prompt belongs to the held-out split, by its hash alone."""
  digest = hashlib.blake2b(prompt.strip().encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") < share * 2**64


def identify_target(source: TargetSource) -> Any:
  """What tells one target from another, as JSON."""
  if source.path:
    return source.path
  network = source.random and dataclasses.asdict(source.random)
  return {"random": network, "seed": source.seed}


# --- Writing ------------------------------------------------------------------


class CorpusWriter:
  """Adds files to a corpus, in an order that a restart can repeat."""

  def __init__(
    self, directory: str | os.PathLike[str], settings: dict[str, Any]
  ):
    """Opens or creates a corpus.

    Raises:
      CorpusError: if the directory holds a corpus made with other settings.
    """
    self.directory = make_directory(directory)
    settings = json.loads(json.dumps(settings))  # tuples become lists
    self.index: dict[str, Any] = {
      "format": FORMAT,
      "settings": settings,
      "prompts": [],
      "shards": [],
      "complete": False,
    }
    if (self.directory / _INDEX).exists():
      self.index = _read_index(self.directory)
    if self.index["settings"] != settings:
      raise CorpusError(
        f"{directory} holds a corpus made with other settings "
        f"({_difference(self.index['settings'], settings)}); choose another "
        "synthesis.output or delete it"
      )

  def add_prompts(self, prompts: Sequence[str], counts: dict[str, int]) -> None:
    """Adds a file of self-written prompts; counts says what was drawn."""
    name = f"prompts-{len(self.index['prompts']):05d}.jsonl"
    self._add("prompts", name, _json_lines(prompts), counts)

  def read_prompts(self) -> list[str]:
    """All self-written prompts so far, in order."""
    texts = []
    for entry in self.index["prompts"]:
      data = _read_checked(self.directory, entry)
      texts += [json.loads(line)["prompt"] for line in data.splitlines()]
    return texts

  def add_shard(
    self, examples: Sequence[Example], counts: dict[str, int]
  ) -> None:
    """Adds a shard; counts says what was answered and why some were dropped."""
    name = f"shard-{len(self.index['shards']):05d}.safetensors"
    lengths = np.array([len(e.tokens) for e in examples], np.int64)
    masks = [np.arange(len(e.tokens)) >= e.prompt_length for e in examples]
    none = [np.zeros((0,), np.int32)]
    data = safetensors.numpy.save(
      {
        "tokens": np.concatenate(none + [e.tokens for e in examples]),
        "loss_mask": np.concatenate(none + masks).astype(np.uint8),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "held_out": np.array([e.held_out for e in examples], np.uint8),
      }
    )
    self._add("shards", name, data, counts)

  def add_held_out(self, name: str, prompts: Sequence[str]) -> None:
    """Writes the held-out prompts of one source, for eval.main."""
    write_whole(self.directory / f"held_out-{name}.jsonl", _json_lines(prompts))

  def finish(self, merged: dict[str, int]) -> None:
    """Marks the corpus complete and totals its counts.

    Args:
      merged: what happened between writing prompts and answering them.
    """
    self.index["totals"] = {
      "self_written": _sum_counts(self.index["prompts"]),
      "merged": merged,
      "answered": _sum_counts(self.index["shards"]),
    }
    self.index["complete"] = True
    self._write_index()

  def _add(
    self, kind: str, name: str, data: bytes, counts: dict[str, int]
  ) -> None:
    write_whole(self.directory / name, data)
    checksum = hashlib.sha256(data).hexdigest()
    self.index[kind].append({"file": name, "sha256": checksum, **counts})
    self._write_index()

  def _write_index(self) -> None:
    text = json.dumps(self.index, indent=1)
    write_whole(self.directory / _INDEX, text.encode())


def _json_lines(prompts: Iterable[str]) -> bytes:
  return "".join(json.dumps({"prompt": p}) + "\n" for p in prompts).encode()


def _sum_counts(entries: Sequence[dict[str, Any]]) -> dict[str, int]:
  total: collections.Counter[str] = collections.Counter()
  for entry in entries:
    total.update({k: v for k, v in entry.items() if isinstance(v, int)})
  return dict(total)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
  """The first setting that differs, with both values."""
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      return f"{name}: {old.get(name)!r}, now {new.get(name)!r}"
  return "none"


# --- Reading ------------------------------------------------------------------


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
    indices = [_read_index(pathlib.Path(path)) for path in directories]
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
    """Examples of one step: a pure function, so a restart changes nothing.

    Every epoch is its own permutation of the training split.
    """
    size = len(self.train)
    places = range(step * batch_size, (step + 1) * batch_size)
    return np.array(
      [
        self.train[_epoch_order(seed, place // size, size)[place % size]]
        for place in places
      ]
    )

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


def spread(indices: np.ndarray, count: int) -> np.ndarray:
  """At most count of the indices, evenly: of each corpus, its share."""
  if len(indices) <= count:
    return indices
  return indices[np.arange(count) * len(indices) // count]


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng([seed, epoch]).permutation(size)


def _read_index(directory: pathlib.Path) -> dict[str, Any]:
  path = directory / _INDEX
  if not path.is_file():
    raise CorpusError(
      f"{directory} holds no corpus (no {_INDEX}); run "
      "python -m train.synthesize first"
    )
  index = read_json(path, _BEGIN_AGAIN)
  if index.get("format") != FORMAT:
    raise CorpusError(
      f"{path} has format {index.get('format')!r}, not {FORMAT}; {_BEGIN_AGAIN}"
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
    raise CorpusError(f"{path} is damaged (missing fields); {_BEGIN_AGAIN}")
  return index


def _is_entry(entry: Any) -> bool:
  if not isinstance(entry, dict):
    return False
  name, checksum = entry.get("file"), entry.get("sha256")
  if not isinstance(name, str) or not isinstance(checksum, str):
    return False
  return name == pathlib.PurePath(name).name


def _read_checked(directory: pathlib.Path, entry: dict[str, Any]) -> bytes:
  """A file the index names, if its checksum holds.

  Raises:
    CorpusError: if it is missing or damaged, by name.
  """
  path = directory / entry["file"]
  if not path.is_file():
    raise CorpusError(f"{path} is missing; {_BEGIN_AGAIN}")
  data = path.read_bytes()
  if hashlib.sha256(data).hexdigest() != entry["sha256"]:
    raise CorpusError(
      f"{path} does not match its checksum in {_INDEX}; {_BEGIN_AGAIN}"
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
  data = _read_checked(directory, entry)
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
    raise CorpusError(f"{path} is no shard ({error}); {_BEGIN_AGAIN}") from (
      error
    )
  if not is_sound:
    raise CorpusError(f"{path} contradicts itself; {_BEGIN_AGAIN}")
  return shard
