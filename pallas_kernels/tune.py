"""Times a few configurations of every kernel on this GPU, and keeps the best.

    python -m pallas_kernels.tune
    python -m pallas_kernels.tune --only=lm_head_verify --output=table.json

For each shape in a table (tuning.FIELDS) the rule of thumb is timed first, then
candidates around it, on real cases; a result that differs from plain XLA's is
not timed. What beats the rule by a margin goes into tuned/<device kind>.json,
which choose_config reads from then on.
"""

import dataclasses
import datetime
import itertools
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags

from pallas_kernels import bench, tuning
from pallas_kernels.cases import Case
from pallas_kernels.devices import Device
from pallas_kernels.measurement import Machine, Row, measure
from pallas_kernels.tuning import Entry

GAIN = 1.03  # times as fast as the rule, else the rule stays
# What is tried of each field, in all combinations; what cannot be had is left.
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
  "lm_head_verify": dict(tile_vocab=(64, 128, 256), stages=(4, 6, 8)),
  "block_attention": dict(split_slots=(256, 512, 1024, 2048, 4096)),
  "block_verify": dict(
    measured=(2048, 4096, 8192), compared=(1024, 2048), raced=(512, 1024, 2048)
  ),
  "fp8_matmul": dict(splits=(1, 2, 3, 4, 6, 8, 12, 16)),
}
Timer = Callable[[Case], Row]


@dataclasses.dataclass(frozen=True)
class Trial:
  """A shape to find a configuration for.

  Attributes:
    operation, shape: as in an Entry.
    cases: that are timed, by their names; their sum decides.
  """

  operation: str
  shape: dict[str, int]
  cases: tuple[str, ...]

  def candidates(self) -> Iterator[dict[str, int]]:
    """The rule of thumb's own, {}, and what else is tried."""
    fields = CANDIDATES[self.operation]
    yield {}
    for values in itertools.product(*fields.values()):
      yield dict(zip(fields, values, strict=True))


def _head(rows: int, *, draws: bool = False) -> Trial:
  case = f"lm_head_verify/qwen3-8b M={rows}{' draws' if draws else ''}"
  shape = {"rows": rows, "draws": int(draws)}
  return Trial("lm_head_verify", shape, (case,))


def _attention(width: int, *shapes: str) -> Trial:
  cases = tuple(f"block_attention/{shape}" for shape in shapes)
  return Trial("block_attention", {"head_width": width}, cases)


def _verify(model: str, vocabulary: int, *shapes: str) -> Trial:
  cases = tuple(f"block_verify/{model} block {shape}" for shape in shapes)
  return Trial("block_verify", {"vocabulary": vocabulary}, cases)


def _matmul(model: str, width: int, features: int) -> Trial:
  case = f"fp8_matmul/{model} {width}x{features} M=16"
  shape = {"features": features, "width": width}
  return Trial("fp8_matmul", shape, (case,))


TRIALS = (
  *(_head(rows) for rows in (16, 32, 64, 128)),
  *(_head(rows, draws=True) for rows in (16, 128)),
  _attention(64, "smollm2-135m B=1 P=8 S=1024", "smollm2-135m B=8 P=16 S=8192"),
  _attention(
    128,
    "qwen3-4b B=1 P=8 S=1024",
    "qwen3-4b B=1 P=16 S=32768",
    "qwen3-4b B=8 P=8 S=8192",
  ),
  _verify("qwen3-8b", 151936, "B=1 P=15", "B=8 P=15"),
  _verify("smollm2-135m", 49152, "B=1 P=7", "B=64 P=7"),
  _matmul("qwen3-8b", 4096, 12288),
  _matmul("qwen3-8b", 4096, 4096),
  _matmul("qwen3-8b", 4096, 6144),
  _matmul("smollm2-135m", 576, 1536),
  _matmul("smollm2-135m", 1536, 576),
)


def search(trial: Trial, cases: Sequence[Case], clock: Timer) -> Entry | None:
  """The fastest configuration; None if it is the rule of thumb's, or nearly.

  Args:
    trial: whose candidates are timed.
    cases: that decide.
    clock: times one case, compared with the reference first.
  """
  found = []
  for fields in trial.candidates():
    with tuning.trying(trial.operation, fields):
      rows = [clock(case) for case in cases]
    failed = next((row.problem for row in rows if row.seconds is None), "")
    seconds = sum(row.seconds or 0 for row in rows)
    label = " ".join(f"{k}={v}" for k, v in fields.items()) or "rule of thumb"
    said = failed or f"{seconds * 1e6:.1f} us"
    print(f"  {label:40} {said}", flush=True)
    if not failed:
      found.append((seconds, fields))
    elif not fields:
      return None  # nothing to compare with
  (by_rule, _), (best, fields) = found[0], min(found, key=lambda pair: pair[0])
  if best * GAIN > by_rule:
    return None
  return Entry(trial.operation, trial.shape, fields, best, by_rule)


def run(
  trials: Sequence[Trial],
  cases: Sequence[Case],
  clock: Timer,
  file: pathlib.Path,
  kind: str,
) -> None:
  """Searches for all trials, and writes the table after each.

  Entries of the file that no trial is about stay.
  """
  by_name = {case.name: case for case in cases}
  entries = list(tuning.read(file))
  for trial in trials:
    shape = " ".join(f"{k}={v}" for k, v in trial.shape.items())
    print(f"{trial.operation} {shape}", flush=True)
    entry = search(trial, [by_name[name] for name in trial.cases], clock)
    kept = [e for e in entries if not e.serves(trial.operation, trial.shape)]
    entries = [*kept, *([entry] if entry else [])]
    write(file, kind, entries)
  tuning.read.cache_clear()


def write(file: pathlib.Path, kind: str, entries: Sequence[Entry]) -> None:
  """Writes a table."""
  record = {
    "device": kind,
    "versions": bench.versions(),
    "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    "command": shlex.join(
      ["python", "-m", "pallas_kernels.tune"] + sys.argv[1:]
    ),
    "entries": [dataclasses.asdict(entry) for entry in entries],
  }
  partial = file.with_name(file.name + ".partial")
  partial.write_text(json.dumps(record, indent=1) + "\n")
  os.replace(partial, file)


def main(argv: list[str]) -> None:
  """Times the configs that can run here, and writes the table of the best."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  values = flags.FLAGS
  device = Device.current()
  if device.architecture is None:
    sys.exit(f"error: no kernel runs on {device.kind}; tune on a GPU")
  trials = [trial for trial in TRIALS if values.only in trial.operation]
  if not trials:
    raise app.UsageError(
      f"--only={values.only}: no operation's name holds that"
    )
  machine = Machine.measure(bench.COPIED_BYTES)
  architectures = (device.architecture,)

  def clock(case: Case) -> Row:
    (row,) = measure(case, architectures, machine)
    return row

  output = pathlib.Path(values.output or tuning.file_of(device.kind))
  try:
    run(trials, bench.all_cases(""), clock, output, device.kind)
  except ValueError as error:  # A table that is damaged.
    sys.exit(f"error: {error}")
  print(f"{output}: {len(tuning.read(output))} entries")


if __name__ == "__main__":
  flags.DEFINE_string("only", "", "Part of the names of operations.")
  flags.DEFINE_string("output", "", "File of the table; its place, if empty.")
  app.run(main)
