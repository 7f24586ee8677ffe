"""Config files: Python with a `get_config()` that returns a Config."""

import dataclasses
import os
import pathlib
import runpy
import typing
from collections.abc import Sequence
from typing import Any

from dflash_jax.config import Config, ConfigError

DEFAULT = "configs/smollm2_135m.py"

_EXAMPLES = {int: "1", bool: "True", str: '"text"'}


def default_path() -> str:
  """The default config, from any directory: beside the package if not here."""
  if pathlib.Path(DEFAULT).is_file():
    return DEFAULT
  return str(pathlib.Path(__file__).parents[1] / DEFAULT)


def read(path: str | os.PathLike[str]) -> Config:
  """The Config that a file describes.

  Raises:
    ConfigError: no such file, or it does not say what a Config is.
  """
  if not pathlib.Path(path).is_file():
    raise ConfigError(
      f"config file {path} does not exist; give a file like those in configs/"
    )
  try:
    names = runpy.run_path(str(path))
    config = names["get_config"]()
  except KeyError as error:
    raise ConfigError(
      f"config file {path} has no {error}; it must define get_config()"
    ) from error
  except (SyntaxError, ImportError, NameError, TypeError) as error:
    raise ConfigError(f"config file {path}: {error}; correct it") from error
  if not isinstance(config, Config):
    raise ConfigError(
      f"config file {path}: get_config() returns a {type(config).__name__}; "
      "it must return a dflash_jax.config.Config"
    )
  return config


def check_overrides(config: Config, names: Sequence[str]) -> None:
  """Raises ConfigError for a name like "decode.nonsense" with no field.

  Args:
    config: that they would override.
    names: dotted paths, from the Config down.
  """
  for name in names:
    section: Any = config
    *parents, last = name.split(".")
    for part in [*parents, last]:
      known = [field.name for field in _fields(section)]
      if part not in known:
        raise ConfigError(
          f"--config.{name}: {type(section).__name__} has no field {part!r}; "
          f"known: {', '.join(known) or 'none'}"
        )
      if part is last and type(section).__dataclass_params__.frozen:
        raise ConfigError(
          f"--config.{name}: a {type(section).__name__} is fixed; edit the "
          "config file instead"
        )
      section = getattr(section, part)


def check_values(section: Any, path: str = "config") -> None:
  """Raises ConfigError for a tuple that holds what its field does not take.

  Flags check single values themselves, but let any tuple pass.
  """
  for field in _fields(section):
    value = getattr(section, field.name)
    check_values(value, f"{path}.{field.name}")
    if typing.get_origin(field.type) is not tuple:
      continue
    kind = typing.get_args(field.type)[0]
    for item in value:
      if type(item) is not kind:
        raise ConfigError(
          f"--{path}.{field.name}: {item!r} is not of type {kind.__name__}; "
          f"write a tuple, as in '({_EXAMPLES[kind]},)'"
        )


def _fields(section: Any) -> tuple[dataclasses.Field, ...]:
  is_section = dataclasses.is_dataclass(section)
  return dataclasses.fields(section) if is_section else ()
