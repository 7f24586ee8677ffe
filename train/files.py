"""Files of a corpus or a run: written whole or not at all, read with care."""

import json
import os
import pathlib
from typing import Any


class FileError(ValueError):
  """A file or directory that cannot be used; says which, and what to do."""


def make_directory(path: str | os.PathLike[str]) -> pathlib.Path:
  """Creates a directory and its parents, unless it is there.

  Raises:
    FileError: when the disk refuses.
  """
  directory = pathlib.Path(path)
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise FileError(
      f"cannot create directory {directory}: {error.strerror}; choose another"
    ) from error
  return directory


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Writes a file so that it is either complete or as it was.

  Raises:
    FileError: when the disk refuses, a full one included.
  """
  partial = path.with_name(path.name + ".partial")
  try:
    with partial.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    partial.rename(path)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise cannot_write(path, error) from error


def cannot_write(path: pathlib.Path, error: OSError) -> FileError:
  """What to tell when writing `path` failed."""
  return FileError(
    f"cannot write {path}: {error.strerror}; free space or choose another "
    "directory, then run the same command again"
  )


def read_json(path: pathlib.Path, remedy: str) -> dict[str, Any]:
  """A JSON object.

  Args:
    path: of the file.
    remedy: what to do if it is damaged.

  Raises:
    FileError: if it is not one.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise FileError(f"cannot read {path}: {error.strerror}; {remedy}") from (
      error
    )
  except ValueError as error:  # neither text nor JSON
    raise FileError(f"{path} is damaged ({error}); {remedy}") from error
  if not isinstance(value, dict):
    raise FileError(f"{path} is damaged (not a JSON object); {remedy}")
  return value
