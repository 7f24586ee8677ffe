"""A corpus on disk: token shards with loss masks, and an index that vouches.

    index.json                 settings, files with checksums, totals
    prompts-00000.jsonl        prompts the target wrote itself
    shard-00000.safetensors    tokens, loss_mask, offsets, held_out
    held_out-NAME.jsonl        prompts of one source that training never sees

Every file is written whole or not at all, and counts only once the index names
it: a killed run leaves nothing half-written that could be read back.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy

FORMAT = 1


class CorpusError(ValueError):
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


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that it is either complete or absent.

  Raises:
    CorpusError: when the disk refuses, a full one included.
  """
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    partial.rename(path)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise CorpusError(
      f"cannot write {path}: {error.strerror}; free space or choose another "
      "directory, then run the same command again"
    ) from error


class CorpusWriter:
  """Adds files to a corpus, in an order that a restart can repeat."""

  def __init__(self, directory: str, settings: dict[str, Any]):
    """Opens or creates a corpus.

    Raises:
      CorpusError: if the directory holds a corpus made with other settings.
    """
    self.directory = pathlib.Path(directory)
    self.directory.mkdir(parents=True, exist_ok=True)
    path = self.directory / "index.json"
    settings = json.loads(json.dumps(settings))  # tuples become lists
    fresh = {
      "format": FORMAT,
      "settings": settings,
      "prompts": [],
      "shards": [],
      "complete": False,
    }
    self.index = json.loads(path.read_text()) if path.exists() else fresh
    if self.index["settings"] != settings:
      raise CorpusError(
        f"{directory} holds a corpus made with other settings (see its "
        "index.json); choose another synthesis.output or delete it"
      )

  def add_prompts(self, prompts: Sequence[str], counts: dict[str, int]) -> None:
    """Adds a file of self-written prompts; counts says what was drawn."""
    name = f"prompts-{len(self.index['prompts']):05d}.jsonl"
    lines = "".join(json.dumps({"prompt": p}) + "\n" for p in prompts)
    self._add("prompts", name, lines.encode(), counts)

  def read_prompts(self) -> list[str]:
    """All self-written prompts so far, in order."""
    texts = []
    for entry in self.index["prompts"]:
      data = read_checked(self.directory, entry)
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
    lines = "".join(json.dumps({"prompt": p}) + "\n" for p in prompts)
    write_whole(self.directory / f"held_out-{name}.jsonl", lines.encode())

  def finish(self) -> None:
    """Marks the corpus complete."""
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
    write_whole(self.directory / "index.json", text.encode())


def read_checked(directory: pathlib.Path, entry: dict[str, Any]) -> bytes:
  """A file the index names, if its checksum holds.

  Raises:
    CorpusError: if it is missing or damaged, by name.
  """
  path = directory / entry["file"]
  if not path.is_file():
    raise CorpusError(f"{path} is missing; run train.synthesize again")
  data = path.read_bytes()
  if hashlib.sha256(data).hexdigest() != entry["sha256"]:
    raise CorpusError(
      f"{path} does not match its checksum in index.json; delete the corpus "
      "and run train.synthesize again"
    )
  return data


class Corpus:
  """Examples of one or more corpus directories, in memory.

  Attributes:
    train, held_out: indices of each split's examples.
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
    shards = [shard for path in directories for shard in _read_shards(path)]
    self.checksum = _combined_checksum(directories)
    self._tokens = np.concatenate([s["tokens"] for s in shards])
    self._mask = np.concatenate([s["loss_mask"] for s in shards]) > 0
    lengths = np.concatenate([np.diff(s["offsets"]) for s in shards])
    self._offsets = np.concatenate([[0], np.cumsum(lengths)])
    held_out = np.concatenate([s["held_out"] for s in shards]) > 0
    self.train = np.flatnonzero(~held_out)
    self.held_out = np.flatnonzero(held_out)
    if not self.train.size:
      raise CorpusError(f"{', '.join(directories)}: no training sequences")

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

  def frequent_tokens(self, count: int, vocab_size: int) -> np.ndarray:
    """i32[count], ids most frequent in training answers, sorted by id.

    Ties, unseen ids among them, go to the lower id.
    """
    seen = np.zeros((vocab_size,), np.int64)
    for index in self.train:
      tokens, mask = self.example(index)
      np.add.at(seen, tokens[mask], 1)
    ranked = np.argsort(-seen, kind="stable")[:count]
    return np.sort(ranked).astype(np.int32)

  def train_indices(self, step: int, batch_size: int, seed: int) -> np.ndarray:
    """Examples of one step: a pure function, so a restart changes nothing.

    Every epoch is its own permutation of the training split.
    """
    size = len(self.train)
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    indices = []
    for place in places:
      order = np.random.default_rng([seed, place // size]).permutation(size)
      indices.append(self.train[order[place % size]])
    return np.array(indices)

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


def _combined_checksum(directories: Sequence[str]) -> str:
  combined = hashlib.sha256()
  for directory in directories:
    for entry in _read_index(directory)["shards"]:
      combined.update(entry["sha256"].encode())
  return combined.hexdigest()


def _read_index(directory: str) -> dict[str, Any]:
  path = pathlib.Path(directory) / "index.json"
  if not path.is_file():
    raise CorpusError(
      f"{directory} holds no corpus (no index.json); run "
      "python -m train.synthesize first"
    )
  return json.loads(path.read_text())


def _read_shards(directory: str) -> list[dict[str, np.ndarray]]:
  root = pathlib.Path(directory)
  index = _read_index(directory)
  if not index["shards"]:
    raise CorpusError(f"{directory} has no shard yet; let train.synthesize run")
  return [
    safetensors.numpy.load(read_checked(root, entry))
    for entry in index["shards"]
  ]
