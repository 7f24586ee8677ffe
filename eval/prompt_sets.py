"""Prompts that are judged together, and how to tell them from others."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

from dflash_jax.prompts import Prompt, read_prompts


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Prompts of one file or benchmark.

  Attributes:
    name: the file's, without its ending.
    prompts: those that are decoded.
    digest: of their text.
  """

  name: str
  prompts: list[Prompt]
  digest: str

  @classmethod
  def of(cls, name: str, prompts: Sequence[Prompt]) -> "PromptSet":
    """These prompts, under a name."""
    text = repr([prompt.turns for prompt in prompts])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return cls(name, list(prompts), digest)

  @classmethod
  def read(cls, path: str, limit: int) -> "PromptSet":
    """The first `limit` prompts of a file; errors as in read_prompts."""
    return cls.of(pathlib.Path(path).stem, read_prompts(path, limit))

  def describe(self) -> dict[str, Any]:
    """What a record says of it."""
    count = len(self.prompts)
    return {"name": self.name, "count": count, "digest": self.digest}
