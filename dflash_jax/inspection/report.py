"""What an inspection found, for people and for programs."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from dflash_jax.config import ConfigError, DrafterConfig, TargetConfig
from dflash_jax.networks import Eagle3Config
from dflash_jax.tokenizer import TokenizerError
from dflash_jax.weights import WeightsError

# Problems shown of one report; --json gives all.
_MOST_SHOWN = 40
_LONGEST_LINE = 2000


@dataclasses.dataclass
class Report:
  """What a checkpoint is and what is wrong with it.

  Attributes:
    path: what was inspected.
    kind: "dflash", "eagle3", "lm" or "unknown".
    title: the same for people, such as "DFlash 2 drafter".
    facts: what is known of it, by name; JSON values.
    problems: what keeps it from being what it says it is.
    notes: what is worth knowing and keeps it from nothing.
    subjects: settings and tensors that a problem names.
    network: as its settings say; None where they are at fault.
  """

  path: str
  kind: str = "unknown"
  title: str = "unknown"
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)
  problems: list[str] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  subjects: set[str] = dataclasses.field(default_factory=set)
  network: DrafterConfig | Eagle3Config | TargetConfig | None = None
  _told: set[str] = dataclasses.field(default_factory=set)

  @property
  def is_sound(self) -> bool:
    return not self.problems

  def add_problem(self, text: str, subject: str = "") -> None:
    """Adds a problem, once."""
    if (line := _plain(text)) not in self._told:
      self.problems.append(line)
      self._told.add(line)
    if subject:
      self.subjects.add(subject)

  def add_note(self, text: str) -> None:
    """Adds a note."""
    self.notes.append(_plain(text))

  def add_error(self, error: Exception) -> None:
    """Adds what a reader complains of, or an error that none foresaw."""
    foreseen = (WeightsError, ConfigError, TokenizerError)
    if isinstance(error, foreseen):
      self.add_problem(str(error), getattr(error, "subject", ""))
    else:
      name = type(error).__name__
      self.add_problem(f"{self.path}: not readable, {name}: {error!s:.500}")

  @contextlib.contextmanager
  def guard(self) -> Iterator[None]:
    """Whatever ends the block becomes a problem, and the inspection goes on."""
    try:
      yield
    except Exception as error:  # a damaged file may raise anything
      self.add_error(error)

  def to_json(self) -> dict[str, Any]:
    """One JSON object, as --json prints it."""
    return {
      "path": _plain(self.path),
      "sound": self.is_sound,
      "kind": self.kind,
      "title": self.title,
      # JSON has no NaN, which a file may have put into its own provenance.
      "facts": json.loads(json.dumps(self.facts), parse_constant=str),
      "problems": self.problems,
      "notes": self.notes,
    }

  def to_text(self) -> str:
    """Lines for a screen."""
    verdict = f"{len(self.problems)} problems"
    if len(self.problems) < 2:
      verdict = "1 problem" if self.problems else "sound"
    lines = [f"{_plain(self.path)}: {self.title}, {verdict}"]
    lines += [
      f"  {name:<18}{_plain(_show(value))}"
      for name, value in self.facts.items()
    ]
    for word, found in (("problem", self.problems), ("note", self.notes)):
      lines += [f"  {word}: {text}" for text in found[:_MOST_SHOWN]]
      if more := len(found[_MOST_SHOWN:]):
        lines.append(f"  {word}: and {more} more; --json lists all")
    return "\n".join(lines)


def _show(value: Any) -> str:
  if isinstance(value, dict):
    parts = [f"{key} {_show(item)}" for key, item in value.items()]
    return "; ".join(parts) or "none"
  if isinstance(value, list | tuple):
    return ", ".join(map(_show, value)) or "none"
  if isinstance(value, bool) or value is None:
    return {True: "yes", False: "no", None: "none"}[value]
  if isinstance(value, int):
    return f"{value:,}"
  return f"{value:,.10g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
  """One line without control characters, which files could use to mislead."""
  if len(text) > _LONGEST_LINE:
    text = f"{text[:_LONGEST_LINE]}..."
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
  )
