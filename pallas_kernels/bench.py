"""How fast the kernels are, against XLA and against this GPU's memory.

    python -m pallas_kernels.bench --json_out=kernels.json
    python -m pallas_kernels.bench --only=lm_head_verify --implementations=sm90

Every implementation that runs here, at every shape of every operation; a result
that differs from plain XLA's is not timed. A kernel's share is what it must
read and write, per second, as part of what a copy of a large array reaches in
the same kind of loop. docs/kernels.md says how to read the table.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from pallas_kernels import compile_check
from pallas_kernels.cases import Case
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import IMPLEMENTATIONS
from pallas_kernels.measurement import (
  HEADING,
  NO_MEMORY,
  Machine,
  Row,
  measure,
)

COPIED_BYTES, COPIED_BYTES_CPU = 2**29, 2**24
ENDLESS = "did not end"
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin")
CONVENTIONS = {
  "seconds": "per call, median over dispatches of many calls each",
  "share_of_copy": "bytes that the operation must move / seconds, over the "
  "same of a copy of a large array (read plus written) in the same loop",
  "speedup": "seconds of xla / seconds",
  "problem": "why there is no time, or none to trust",
}


@dataclasses.dataclass(frozen=True)
class Aim:
  """What kernels should reach.

  Attributes:
    cases: pattern of the cases' whole names.
    share: of the copy bandwidth; 0 for any.
    speedup: over XLA; 0 for any.
  """

  cases: str
  share: float = 0.0
  speedup: float = 0.0

  def covers(self, name: str) -> bool:
    return re.fullmatch(self.cases, name) is not None

  def judge(self, row: Row) -> str:
    """Met or missed; open without a time to trust, or without XLA's."""
    if row.seconds is None or row.problem or (self.speedup and not row.speedup):
      return "open"
    fast = row.share_of_copy >= self.share
    return "met" if fast and (row.speedup or 0) >= self.speedup else "missed"


AIMS = (
  Aim("lm_head_verify/qwen3-8b M=16", share=0.85),
  Aim("lm_head_verify/qwen3-8b M=128", speedup=1.2),
  Aim("block_attention/qwen3-4b B=1 P=16 S=32768", share=0.80, speedup=3.0),
  Aim("block_verify/qwen3-8b (token|block) B=(8|64) P=15", share=0.80),
  Aim("fp8_matmul/qwen3-8b .*", share=0.75),
)


def judge(rows: Sequence[Row], aims: Sequence[Aim]) -> list[dict[str, Any]]:
  """A record for each aim of each kernel that was tried."""
  return [
    dataclasses.asdict(aim)
    | {
      "cases": row.case,
      "implementation": row.implementation,
      "verdict": aim.judge(row),
      "found": row.problem or _describe(row.share_of_copy, row.speedup),
    }
    for aim in aims
    for row in rows
    if row.implementation != "xla" and aim.covers(row.case)
  ]


def _describe(share: float, speedup: float | None) -> str:
  parts = [f"{share:.0%} of copy"] if share else []
  return ", ".join([*parts, f"{speedup:.2f}x xla"] if speedup else parts)


def print_verdicts(verdicts: Sequence[dict[str, Any]]) -> None:
  """Prints a line for each aim: what it is, and whether it is met."""
  for record in verdicts:
    aim = _describe(record["share"], record["speedup"])
    print(
      f"{record['verdict']:6} {record['cases']} {record['implementation']}: "
      f"{record['found']}; the aim is {aim}"
    )


# --- What was found -----------------------------------------------------------


@dataclasses.dataclass
class Report:
  """What was found so far.

  Attributes:
    machine: of all rows.
    file: where it is written, after every row; None for nowhere.
    rows: in the order they were measured.
    complete: whether nothing is left to do.
  """

  machine: Machine
  file: pathlib.Path | None = None
  rows: list[Row] = dataclasses.field(default_factory=list)
  complete: bool = False

  def header(self) -> dict[str, Any]:
    """What rows of two runs must share to stand in one table."""
    return {
      "device": self.machine.kind,
      "versions": versions(),
    }

  def resume(self) -> None:
    """Takes over what a run on the same kind of device, and versions, left.

    Rows that failed are left out, so that they are tried again; not those that
    never ended.
    """
    if self.file is None or not self.file.exists():
      return
    earlier = json.loads(self.file.read_text())
    if all(earlier.get(key) == value for key, value in self.header().items()):
      rows = [Row(**row) for row in earlier["rows"]]
      final = (ENDLESS, NO_MEMORY)
      self.rows = [r for r in rows if r.seconds or r.problem in final]

  def has(self, case: Case, implementations: Sequence[str]) -> bool:
    found = {r.implementation for r in self.rows if r.case == case.name}
    return set(implementations) <= found

  def write(self, pending: Sequence[Row] = ()) -> None:
    """Writes the file; `pending` rows stand for what is being measured."""
    if self.file is None:
      return
    record = self.header() | {
      "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
      "command": shlex.join(sys.argv),
      "python": platform.python_version(),
      "complete": self.complete,
      "machine": dataclasses.asdict(self.machine),
      "conventions": CONVENTIONS,
      "aims": judge(self.rows, AIMS),
      "rows": [dataclasses.asdict(row) for row in (*self.rows, *pending)],
    }
    partial = self.file.with_name(self.file.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, self.file)

  def failures(self) -> list[Row]:
    return [r for r in self.rows if not r.seconds and r.problem != NO_MEMORY]


def versions() -> dict[str, str]:
  """Of the packages that make machine code; "" for those that are not here."""
  found = {}
  for package in PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = ""
  return found


# --- The command --------------------------------------------------------------


def all_cases(only: str) -> list[Case]:
  """Cases whose names hold `only`; those with an aim come first."""
  found = compile_check.cases(IMPLEMENTATIONS[-1], only, twins=True)
  cases = [case for case, _ in found]
  return sorted(cases, key=lambda c: not any(a.covers(c.name) for a in AIMS))


def run(
  cases: Sequence[Case],
  implementations: Sequence[str],
  report: Report,
  deadline: float = float("inf"),
) -> None:
  """Measures what the report lacks, and prints a line for each row.

  Args:
    cases: in the order they are measured.
    implementations: of each case, in the order of its rows.
    report: grows, and is written after every row.
    deadline: by time.monotonic; no case starts after it.
  """
  print(HEADING)
  for row in report.rows:
    print(row)
  for case in cases:
    if report.has(case, implementations):
      continue
    if time.monotonic() > deadline:
      report.write()
      return
    report.rows = [row for row in report.rows if row.case != case.name]
    # A kernel may hang; then this is what the file says of it.
    pending = [Row(case.name, n, problem=ENDLESS) for n in implementations]
    report.write(pending)
    for row in measure(case, implementations, report.machine):
      print(row, flush=True)
      report.rows.append(row)
      del pending[0]
      report.write(pending)
  report.complete = True
  report.write()


def choose_implementations(asked: Sequence[str], device: Device) -> list[str]:
  """Those asked for, or all that can run; the reference comes first.

  Raises:
    ValueError: one that cannot run here.
  """
  able = [name for name in ("xla", device.architecture) if name]
  if unable := sorted(set(asked) - set(able)):
    raise ValueError(
      f"--implementations: {', '.join(unable)} cannot run on {device.kind}; "
      f"choose among {', '.join(able)}"
    )
  return [name for name in able if name in (asked or able)]


def main(argv: list[str]) -> None:
  """Times what the flags ask for, until the minutes are up."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  values = flags.FLAGS
  deadline = time.monotonic() + 60 * values.minutes
  device = Device.current()
  try:
    implementations = choose_implementations(values.implementations, device)
  except ValueError as error:
    raise app.UsageError(str(error)) from error
  cases = all_cases(values.only)
  if not cases:
    raise app.UsageError(f"--only={values.only}: no case's name holds that")

  on_gpu = device.architecture is not None
  machine = Machine.measure(COPIED_BYTES if on_gpu else COPIED_BYTES_CPU)
  print(
    f"{device.kind}: a copy reads and writes "
    f"{machine.copy_bytes_per_s / 1e9:,.0f} GB/s"
  )
  if not on_gpu:
    print("No kernel runs here: these times say nothing about kernels.")
  file = pathlib.Path(values.json_out) if values.json_out else None
  report = Report(machine, file)
  if values.resume:
    report.resume()
  run(cases, implementations, report, deadline)
  print_verdicts(judge(report.rows, AIMS))
  if not report.complete:
    print("Not done: repeat the command with --resume.")
  if failures := report.failures():
    sys.exit(f"{len(failures)} not timed: see the table")


if __name__ == "__main__":
  flags.DEFINE_string("only", "", "Part of the names of the cases wanted.")
  flags.DEFINE_list(
    "implementations", [], f"Some of {', '.join(IMPLEMENTATIONS)}."
  )
  flags.DEFINE_string("json_out", "", "File for the results.")
  flags.DEFINE_bool("resume", False, "Keep what that file holds already.")
  flags.DEFINE_float("minutes", 1e6, "Start no case after that.")
  app.run(main)
