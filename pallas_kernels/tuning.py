"""Tuned configurations: tables per kind of device, read where one is chosen.

A table is data, tuned/<device kind>.json, written by pallas_kernels.tune. Rules
of thumb in <operation>/config.py hold for everything that it does not name.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pallas_kernels.devices import Device

FOLDER = pathlib.Path(__file__).parent / "tuned"
REMEDY = "make it anew with `python -m pallas_kernels.tune`, or delete it"


class Fields(NamedTuple):
  """What an entry says: for which shapes, and what of their Config."""

  shape: tuple[str, ...]
  config: tuple[str, ...]


# Not what a row's result depends on, unless all rows share it: verification and
# plain decoding must not disagree.
FIELDS = {
  "lm_head_verify": Fields(("rows", "draws"), ("tile_vocab", "stages")),
  "block_attention": Fields(("head_width",), ("split_slots",)),
  "block_verify": Fields(("vocabulary",), ("measured", "compared", "raced")),
  "fp8_matmul": Fields(("features", "width"), ("splits",)),
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A configuration that was timed.

  Attributes:
    operation: a key of FIELDS.
    shape: what it is for, all of the operation's fields.
    config: what it changes in the rule of thumb's, some of them.
    seconds: per call, summed over the cases it was chosen by.
    seconds_by_rule: of the rule of thumb.
  """

  operation: str
  shape: dict[str, int]
  config: dict[str, int]
  seconds: float
  seconds_by_rule: float

  def __str__(self) -> str:
    return f"{self.operation} {_describe(self.shape)}"

  def serves(self, operation: str, shape: dict[str, int]) -> bool:
    return (self.operation, self.shape) == (operation, shape)


def file_of(kind: str) -> pathlib.Path:
  """Where the table of a kind of device is."""
  name = re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
  return FOLDER / f"{name}.json"


@functools.cache
def read(file: pathlib.Path) -> tuple[Entry, ...]:
  """The entries of a table; none if there is no file.

  Raises:
    ValueError: a table that is damaged, or says what it cannot.
  """
  try:
    text = file.read_text()
  except FileNotFoundError:
    return ()
  try:
    records = json.loads(text)["entries"]
    return tuple(_parse(*numbered) for numbered in enumerate(records))
  except (ValueError, TypeError, KeyError) as error:
    what = f"no {error}" if isinstance(error, KeyError) else error
    raise ValueError(f"{file}: {what}; {REMEDY}") from error


def _parse(index: int, record: Any) -> Entry:
  try:
    entry = Entry(**record)
    known = FIELDS.get(entry.operation)
    if known is None:
      raise ValueError(f"{entry.operation!r} is none of {', '.join(FIELDS)}")
    if set(entry.shape) != set(known.shape):
      raise ValueError(
        f"shape {entry.shape} must have {', '.join(known.shape)}"
      )
    if not entry.config or set(entry.config) - set(known.config):
      raise ValueError(
        f"config {entry.config} may have {', '.join(known.config)}"
      )
    for name, value in (entry.shape | entry.config).items():
      if type(value) is not int or value < 0:
        raise ValueError(f"{name}={value!r}; use a whole number")
  except (TypeError, ValueError) as error:
    raise ValueError(f"entry {index}: {error}") from error
  return entry


def tuned[Config: Any](
  operation: str,
  shape: dict[str, int],
  config: Config,
  find_fault: Callable[[Config], str | None],
) -> Config:
  """The configuration with what the table of the default device says of it.

  Args:
    operation: a key of FIELDS.
    shape: of a call, all of the operation's fields.
    config: by the rule of thumb.
    find_fault: of a configuration: why no kernel can have it, if so.

  Raises:
    ValueError: the table is damaged, or its entry cannot be had.
  """
  if _trial is not None:
    changed, source = _trial.get(operation, {}), "trial"
  else:
    file = file_of(Device.current().kind)
    found = [e for e in read(file) if e.serves(operation, shape)]
    if not found:
      return config
    changed, source = found[0].config, str(file)
  config = dataclasses.replace(config, **changed)
  if fault := find_fault(config):
    where = f"{source}: {operation} {_describe(shape)}"
    remedy = f"; {REMEDY}" if _trial is None else ""
    raise ValueError(f"{where}: {_describe(changed)}: {fault}{remedy}")
  return config


_trial: dict[str, dict[str, int]] | None = None


@contextlib.contextmanager
def trying(operation: str, config: dict[str, int]) -> Iterator[None]:
  """Puts a configuration in the place of all tables; {} for the rule's own."""
  global _trial
  before, _trial = _trial, {operation: config}
  try:
    yield
  finally:
    _trial = before


def _describe(fields: dict[str, int]) -> str:
  return " ".join(f"{name}={value}" for name, value in fields.items())
