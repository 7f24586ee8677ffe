"""The inverse of config.to_json: a run's record, read back strictly."""

import dataclasses
import json
import types
import typing
from typing import Any

from dflash_jax.config import ConfigError


def from_json[T](kind: type[T], text: str, source: str) -> T:
  """A config dataclass from the text that to_json made of it.

  Fields that the text lacks take their defaults, so that older records can be
  read.

  Args:
    kind: the dataclass, Config or a section of it.
    text: JSON.
    source: where it came from, for messages.

  Raises:
    ConfigError: unknown or missing fields, or values of another type, by name.
  """
  try:
    value = json.loads(text)
  except json.JSONDecodeError as error:
    raise ConfigError(f"{source} is not JSON: {error}") from error
  return _read(kind, value, source)


def _read(kind: Any, value: Any, where: str) -> Any:
  """The value as `kind`, which is the type of some field."""
  if dataclasses.is_dataclass(kind):
    return _read_fields(kind, value, where)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:
    if value is None and types.NoneType in arguments:
      return None
    inner = [kind for kind in arguments if kind is not types.NoneType]
    return _read(_choose(inner, value), value, where)
  if origin is tuple and isinstance(value, list):
    return tuple(_read(arguments[0], item, where) for item in value)
  if origin is typing.Literal and value in arguments:
    return value
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise ConfigError(f"{where}: {value!r} is not a {kind}")
  return value


def _choose(kinds: list[Any], value: Any) -> Any:
  """The dataclass that has all fields of the value, or else the first."""
  for kind in kinds if isinstance(value, dict) else []:
    fields = {field.name for field in dataclasses.fields(kind)}
    if fields >= value.keys():
      return kind
  return kinds[0]


def _read_fields(kind: Any, value: Any, where: str) -> Any:
  if not isinstance(value, dict):
    raise ConfigError(f"{where}: {value!r} is not an object")
  fields = {field.name: field for field in dataclasses.fields(kind)}
  for name in value:
    if name not in fields:
      raise ConfigError(
        f"{where}: {kind.__name__} has no field {name!r}; known: "
        f"{', '.join(fields)}"
      )
  for name, field in fields.items():
    has_default = (
      field.default is not dataclasses.MISSING
      or field.default_factory is not dataclasses.MISSING
    )
    if name not in value and not has_default:
      raise ConfigError(f"{where}: {kind.__name__} lacks its field {name!r}")
  return kind(
    **{
      name: _read(fields[name].type, item, f"{where}: {name}")
      for name, item in value.items()
    }
  )
