"""What differs between the settings of two records."""

import dataclasses
from typing import Any

# What of a record says how it was measured, and on what.
SECTIONS = (
  "config",
  "drafter_digest",
  "versions",
  "machine",
  "prompt_set",
  "date",
)


@dataclasses.dataclass(frozen=True)
class Change:
  """A field that is one thing here and another there.

  Attributes:
    name: dotted, such as "config.decode.width".
    here, there: its values; None where a record lacks it.
  """

  name: str
  here: Any
  there: Any

  def __str__(self) -> str:
    return f"{self.name} {self.here!r}, not {self.there!r}"


def compare_settings(
  here: dict[str, Any], there: dict[str, Any]
) -> list[Change]:
  """All changes of SECTIONS, in order of their names."""
  ours, theirs = (
    _flatten({name: record.get(name) for name in SECTIONS})
    for record in (here, there)
  )
  return [
    Change(name, ours.get(name), theirs.get(name))
    for name in sorted(ours | theirs)
    if ours.get(name) != theirs.get(name)
  ]


def _flatten(tree: Any, name: str = "") -> dict[str, Any]:
  """Leaves by dotted name; lists are leaves."""
  if not isinstance(tree, dict):
    return {name: tree}
  found: dict[str, Any] = {}
  for key, value in tree.items():
    found |= _flatten(value, f"{name}.{key}" if name else key)
  return found
