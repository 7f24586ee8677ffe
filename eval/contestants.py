"""The drafters of a suite, a line each: "NAME: PATH field=value ..."."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any

from dflash_jax.config import ConfigError, DecodeConfig
from eval import sweep
from eval.protocol import PLAIN

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_EXAMPLE = "'eagle3: runs/eagle3/drafter width=fixed:5'"


@dataclasses.dataclass(frozen=True, eq=False)
class Contestant:
  """A drafter of the suite.

  Attributes:
    name: in tables and file names.
    path: as drafter.path.
    settings: fields of the decode section, typed.
  """

  name: str
  path: str
  settings: dict[str, Any]

  def decode(self, base: DecodeConfig, temperature: float) -> DecodeConfig:
    """How it decodes."""
    return dataclasses.replace(base, temperature=temperature, **self.settings)


def parse(lines: Sequence[str]) -> list[Contestant]:
  """The drafters of config.suite.

  Raises:
    ConfigError: for a line that makes no sense, naming it.
  """
  if not lines:
    raise ConfigError(
      f"config.suite.drafters is empty; give lines like {_EXAMPLE}"
    )
  return [_parse(line) for line in lines]


def _parse(line: str) -> Contestant:
  name, colon, rest = line.partition(":")
  where = f"config.suite.drafters, line {line!r}:"
  if not colon or not _NAME.fullmatch(name) or name == PLAIN:
    raise ConfigError(
      f"{where} needs a name of letters, digits, _ and -, other than {PLAIN}, "
      f"before a colon; write one like {_EXAMPLE}"
    )
  try:
    words = shlex.split(rest)
  except ValueError as error:
    raise ConfigError(f"{where} {error}; see {_EXAMPLE}") from error
  if not words or words[0] == "none":
    raise ConfigError(
      f"{where} names no drafter; plain decoding is measured anyway, see "
      f"{_EXAMPLE}"
    )
  settings: dict[str, Any] = {}
  for word in words[1:]:
    field, _, value = word.partition("=")
    if field not in sweep.AXES or field in sweep.LAW:
      allowed = [axis for axis in sweep.AXES if axis not in sweep.LAW]
      raise ConfigError(
        f"{where} {field!r} cannot differ between drafters; choose from "
        f"{', '.join(allowed)}"
      )
    settings[field] = sweep.read_value(field, value, where)
  return Contestant(name, words[0], settings)
