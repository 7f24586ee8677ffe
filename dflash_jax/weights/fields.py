"""Typed reading of the key-value settings that come with a checkpoint."""

import dataclasses
import json
import math
import os
import pathlib
import stat
from collections.abc import Mapping
from typing import Any

import numpy as np

from dflash_jax.weights.names import WeightsError

# Far above any real setting, far below what would exhaust memory in a loop.
_MOST = 2**31 - 1
MOST_LAYERS = 4096
_LONGEST_JSON = 100_000_000  # bytes; the index of the largest model has 10^7
_DEEPEST_JSON = 64


@dataclasses.dataclass(frozen=True)
class Fields:
  """Settings by key; every fault is a WeightsError that names file and key.

  A key whose value is null counts as missing, and a missing key without a
  default is a fault.

  Attributes:
    values: the settings.
    source: the file they come from.
    remedy: what the user can do about a faulty setting.
    prefix: put before every key.
  """

  values: Mapping[str, Any]
  source: str
  remedy: str
  prefix: str = ""

  def fault(self, key: str, what: str) -> WeightsError:
    return WeightsError(
      f"{self.source}: {self.prefix}{key} {what}; {self.remedy}", key
    )

  def refuse(self, key: str, value: Any, instead: str) -> WeightsError:
    return WeightsError(
      f"{self.source}: {self.prefix}{key}={value!r:.200} is not supported; "
      f"{instead}",
      key,
    )

  def raw(self, key: str) -> Any:
    """The value as it stands there, or None."""
    return self.values.get(self.prefix + key)

  def _typed(self, key: str, kinds: Any, name: str, default: Any) -> Any:
    value = self.raw(key)
    if value is None:
      if default is None:
        raise self.fault(key, "is missing")
      return default
    # bool is an int, but true is not a count.
    if not isinstance(value, kinds) or isinstance(value, bool) != (
      kinds is bool
    ):
      raise self.fault(key, f"is {value!r:.200}, expected {name}")
    return value

  def integer(
    self,
    key: str,
    default: int | None = None,
    *,
    least: int = 1,
    most: int = _MOST,
  ) -> int:
    value = self._typed(key, int, "a whole number", default)
    if not least <= value <= most:
      raise self.fault(key, f"is {value!s:.200}, expected {least} to {most}")
    return value

  def number(self, key: str, default: float | None = None) -> float:
    value = self._typed(key, (int, float), "a number", default)
    try:
      number = float(value)
    except OverflowError:  # a whole number past the largest float
      number = math.inf
    if not math.isfinite(number):
      raise self.fault(key, f"is {value!s:.200}, expected a finite number")
    return number

  def positive(self, key: str, default: float | None = None) -> float:
    value = self.number(key, default)
    if value <= 0:
      raise self.fault(key, f"is {value}, expected a positive number")
    return value

  def flag(self, key: str, default: bool) -> bool:
    return self._typed(key, bool, "true or false", default)

  def text(self, key: str, default: str | None = None) -> str:
    return self._typed(key, str, "a text", default)

  def items(
    self, key: str, kind: type, default: list[Any] | None = None
  ) -> list[Any]:
    """A list whose elements are all of one kind."""
    values = self._typed(key, list, "a list", default)
    for value in values:
      if type(value) is not kind:
        raise self.fault(
          key, f"holds {value!r:.200}, expected only {kind.__name__}"
        )
    return values

  def section(self, key: str) -> "Fields":
    """The settings nested under a key; none if it is missing."""
    values = self._typed(key, dict, "an object", {})
    return Fields(values, f"{self.source}, {key}", self.remedy)


def shortest_float(value: float) -> float:
  """The float whose shortest decimal is that of `value` in float32.

  Files that store settings in float32 give 1e-5 as 9.99999974e-06; this gives
  1e-5 back, which is the same float32.
  """
  return float(str(np.float32(value)))


def parse_json(text: bytes) -> Any:
  """A JSON value; ValueError or RecursionError for one that is unsound.

  Names that are there twice are unsound, for readers differ in which counts,
  and so is what is nested deeper than any setting or header.
  """

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
      if name in values:
        raise ValueError(f"{name[:200]!r} is there twice")
      values[name] = value
    return values

  value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
  _check_depth(value, _DEEPEST_JSON)
  return value


def _check_depth(value: Any, left: int) -> None:
  if not isinstance(value, dict | list):
    return
  if not left:
    raise ValueError(f"it is nested deeper than {_DEEPEST_JSON} levels")
  for item in value.values() if isinstance(value, dict) else value:
    _check_depth(item, left - 1)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
  """The object in a JSON file; WeightsError if there is no sound one."""
  path = pathlib.Path(path)
  remedy = "fetch the checkpoint again"
  try:
    _check_readable(path)
    value = parse_json(path.read_bytes())
  except FileNotFoundError:
    raise WeightsError(
      f"{path}: no such file; name a directory in Hugging Face layout that "
      "holds it"
    ) from None
  except (OSError, ValueError, RecursionError) as error:
    raise WeightsError(
      f"{path}: not readable as JSON: {error}; {remedy}"
    ) from error
  if not isinstance(value, dict):
    raise WeightsError(
      f"{path}: holds {type(value).__name__}, expected an object; {remedy}"
    )
  return value


def _check_readable(path: pathlib.Path) -> None:
  """Raises OSError or ValueError for what would not end, or take all memory."""
  status = path.stat()
  if not stat.S_ISREG(status.st_mode):
    raise ValueError("it is no regular file")
  if status.st_size > _LONGEST_JSON:
    raise ValueError(
      f"it has {status.st_size} bytes, and {_LONGEST_JSON} is the limit"
    )
