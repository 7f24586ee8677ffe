"""Directories that appear whole or not at all."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Set
from typing import BinaryIO

from dflash_jax.weights.names import WeightsError


@dataclasses.dataclass(frozen=True)
class TemporaryDirectory:
  """A directory that is not yet in its place."""

  path: pathlib.Path

  @contextlib.contextmanager
  def open(self, name: str) -> Iterator[BinaryIO]:
    """A new file in it, on disk for certain once the block ends."""
    with (self.path / name).open("wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())


def _sync_directory(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _check_replaceable(directory: pathlib.Path, known: Set[str]) -> None:
  if not directory.exists():
    return
  if not directory.is_dir():
    raise WeightsError(
      f"{directory}: is a file, not a directory; choose another place"
    )
  others = sorted({entry.name for entry in directory.iterdir()} - known)
  if others:
    raise WeightsError(
      f"{directory}: not replaced, because it also holds {others[0]!r}; "
      "choose a new directory, or move that away"
    )


def _swap_in(temporary: pathlib.Path, directory: pathlib.Path) -> None:
  """Renames `temporary` to `directory`, whose contents go."""
  if not directory.exists():
    temporary.rename(directory)
    return
  old = temporary.with_name(temporary.name + ".old")
  directory.rename(old)
  try:
    temporary.rename(directory)
  except OSError:
    old.rename(directory)
    raise
  shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def replace_directory(
  directory: pathlib.Path, known: Set[str]
) -> Iterator[TemporaryDirectory]:
  """Gives a directory to fill, and puts it in place when the block ends.

  Args:
    directory: the place.
    known: files that the directory there may hold and lose; any other file
      keeps it from being replaced.

  Raises:
    WeightsError: the place is taken, or something could not be written; then
      what was there before still is, and nothing else.
  """
  directory = directory.absolute()
  parent = directory.parent
  try:
    _check_replaceable(directory, known)
    parent.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent)
  except OSError as error:
    raise WeightsError(f"{directory}: cannot be written: {error}") from error
  temporary = pathlib.Path(made)
  try:
    # mkdtemp makes it private, unlike any other new directory.
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    yield TemporaryDirectory(temporary)
    _sync_directory(temporary)
    _swap_in(temporary, directory)
    _sync_directory(parent)
  except OSError as error:
    raise WeightsError(
      f"{directory}: cannot be written: {error}; free some space "
      "or choose another place, and save again"
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
