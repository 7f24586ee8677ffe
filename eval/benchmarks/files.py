"""Rows of the files that benchmarks are published in, as they are."""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence

from dflash_jax.prompts import PromptError
from eval.benchmarks.catalog import Entry
from eval.benchmarks.tasks import Row

# (where a row stands, for complaints; the row)
Place = tuple[str, Row]

_INSTALL = "pip install 'dflash-jax[eval]'"


def find(entry: Entry, data_dir: str) -> list[pathlib.Path]:
  """The files of a benchmark in DIR/NAME: the first that is there, or all.

  Raises:
    PromptError: none is there; says what to put where.
  """
  directory = pathlib.Path(data_dir) / entry.name
  found = [path for f in entry.files if (path := directory / f).is_file()]
  if not found:
    is_missing = "" if directory.is_dir() else ", which does not exist"
    raise PromptError(
      f"benchmark {entry.name}: no data in {directory}{is_missing}; put "
      f"{say_files(entry)} there, as published at {entry.published}"
    )
  return found if entry.parts else found[:1]


def say_files(entry: Entry) -> str:
  """The file names, for a person."""
  if entry.parts:
    return f"one or more of {', '.join(entry.files)}"
  return " or ".join(entry.files)


def read(paths: Sequence[pathlib.Path]) -> Iterator[Place]:
  """The rows of files, one after the other, in order.

  Args:
    paths: .jsonl, .jsonl.gz, .json (a list of objects) or .parquet.

  Raises:
    PromptError: a file is damaged; names file, line and what was expected.
  """
  for path in paths:
    if path.suffix == ".parquet":
      yield from _read_parquet(path)
    elif path.suffix == ".json":
      yield from _read_json(path)
    else:
      yield from _read_lines(path)


def _read_lines(path: pathlib.Path) -> Iterator[Place]:
  opened = gzip.open if path.suffix == ".gz" else open
  number = 0
  try:
    with opened(path, "rt", encoding="utf-8") as lines:
      for number, line in enumerate(lines, start=1):
        if line.strip():
          where = f"{path}, line {number}"
          yield where, _check(_parse(line, where), where)
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
    raise PromptError(
      f"{path}, after line {number}: cannot be read ({error}); get the file "
      "again"
    ) from error


def _parse(line: str, where: str) -> object:
  try:
    return json.loads(line)
  except ValueError as error:
    raise PromptError(
      f"{where}: not JSON ({error}); expected an object per line; get the file "
      "again"
    ) from error


def _read_json(path: pathlib.Path) -> Iterator[Place]:
  try:
    rows = json.loads(path.read_text(encoding="utf-8"))
  except json.JSONDecodeError as error:
    raise PromptError(
      f"{path}, line {error.lineno}: not JSON ({error.msg}); expected a list "
      "of objects; get the file again"
    ) from error
  except (OSError, ValueError) as error:
    raise PromptError(
      f"{path}: cannot be read ({error}); get the file again"
    ) from error
  if not isinstance(rows, list):
    raise PromptError(
      f"{path}, line 1: expected a list of objects, found "
      f"{type(rows).__name__}; get the file again"
    )
  for number, row in enumerate(rows, start=1):
    where = f"{path}, row {number}"
    yield where, _check(row, where)


def _read_parquet(path: pathlib.Path) -> Iterator[Place]:
  try:
    import datasets  # optional: JSON needs none
  except ImportError as error:
    raise PromptError(
      f"{path}: parquet is read by the package datasets, which is not "
      f"installed: {_INSTALL}; or put the same data there as JSON lines"
    ) from error
  try:
    table = datasets.load_dataset("parquet", data_files=str(path))
    rows = list(table["train"])
  # What a damaged file raises differs with the versions of two packages.
  except Exception as error:
    raise PromptError(
      f"{path}: not readable as parquet ({type(error).__name__}: {error}); get "
      "the file again"
    ) from error
  for number, row in enumerate(rows, start=1):
    yield f"{path}, row {number}", row


def _check(row: object, where: str) -> Row:
  if not isinstance(row, dict):
    raise PromptError(
      f"{where}: expected an object, found {str(row)[:40]!r}; get the file "
      "again"
    )
  return row
