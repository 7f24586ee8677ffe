"""Writing a corpus; train/corpus.py says what it looks like on disk."""

import collections
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from train.corpus import (
  FORMAT,
  INDEX,
  CorpusError,
  read_checked,
  read_index,
)
from train.files import make_directory, write_whole


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
    if (self.directory / INDEX).exists():
      self.index = read_index(self.directory)
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
    write_whole(self.directory / INDEX, text.encode())


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
