"""What an ablation has found so far: one JSON object a line, by kind.

    grid       what is compared and how it is judged; the last one counts
    trial      a trained run: size, cost, held-out tau as walked
    failure    a run that ended badly, and why
    refusal    a way to decode that a drafter cannot serve, and why
    reply      one prompt, decoded one way by one drafter

The report is made of this file alone.
"""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from train.files import FileError, cannot_write, make_directory, write_whole

FILE = "results.jsonl"

Record = dict[str, Any]


class Results:
  """The results.jsonl of a workdir.

  A line that was cut short is dropped: what it said is found again.

  Attributes:
    path: of the file.
    records: all of them, in order.
  """

  def __init__(self, workdir: pathlib.Path):
    """Opens it, or begins it.

    Raises:
      FileError: for a damaged file, or a disk that refuses.
    """
    self.path = make_directory(workdir) / FILE
    text = self.path.read_text() if self.path.exists() else ""
    lines = text.split("\n")
    self.records = [self._parse(line) for line in lines[:-1]]
    if lines[-1]:
      whole = "".join(f"{line}\n" for line in lines[:-1])
      write_whole(self.path, whole.encode())

  def _parse(self, line: str) -> Record:
    try:
      record = json.loads(line)
      if isinstance(record["kind"], str):
        return record
    except (ValueError, KeyError, TypeError):
      pass
    raise FileError(
      f"{self.path} is damaged (line {line[:60]!r}); delete it to judge all "
      "drafters anew"
    )

  def of_kind(self, kind: str) -> list[Record]:
    """Its records of one kind, in order."""
    return [record for record in self.records if record["kind"] == kind]

  @property
  def grid(self) -> Record | None:
    """The newest description of the grid."""
    found = self.of_kind("grid")
    return found[-1] if found else None

  def add(self, records: Iterable[Record]) -> None:
    """Appends records.

    Raises:
      FileError: when the disk refuses.
    """
    new = list(records)
    try:
      with self.path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in new))
    except OSError as error:
      raise cannot_write(self.path, error) from error
    self.records += new
