"""Runs interpreted kernels in a process of their own: a wrong one may hang.

The interpreter simulates threads, barriers, asynchronous copies and tensor
cores, fills fresh memory with NaN, and reports races. A job is a call of a
check, `module:function(**arguments)`, perhaps with a bug planted in one file.
The process imports the kernels anew for every job.
"""

import dataclasses
import importlib
import importlib.abc
import importlib.util
import json
import os
import pathlib
import selectors
import subprocess
import sys
import time
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
VERDICT = "verdict: "  # begins a line of the child's output
SOUND, RACE, HANG = "sound", "race", "hang"
# A process whose threads all sleep, unchanged, in so many looks, hangs.
LOOK, LOOKS = 0.5, 8  # seconds between them; how many


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A bug to plant.

  Attributes:
    name: what is wrong.
    file: under pallas_kernels/.
    old, new: text that stands there once, and what replaces it.
    arguments: of the check that must notice.
  """

  name: str
  file: str
  old: str
  new: str
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
  """A check to run: where it is, what it is given, what is broken."""

  check: str
  arguments: dict[str, Any]
  mutant: Mutant | None = None


def run(jobs: list[Job], timeout: float) -> list[str]:
  """A verdict for each job: SOUND, RACE, HANG, or what was raised.

  Args:
    jobs: to run in order.
    timeout: seconds for each; a job that takes longer hangs.
  """
  verdicts: list[str] = []
  while len(verdicts) < len(jobs):
    verdicts += _run_until_hang(jobs[len(verdicts) :], timeout)
  return verdicts


def _run_until_hang(jobs: list[Job], timeout: float) -> list[str]:
  child = subprocess.Popen(
    [sys.executable, "-m", __name__],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert child.stdin is not None and child.stdout is not None
  with child, selectors.DefaultSelector() as ready:
    ready.register(child.stdout, selectors.EVENT_READ)
    found: list[str] = []
    for job in jobs:
      child.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
      child.stdin.flush()
      line = ""
      while not line.startswith(VERDICT):
        if not _becomes_ready(ready, child.pid, timeout):
          child.kill()
          return [*found, HANG]
        line = child.stdout.readline()
        if not line:
          raise RuntimeError(f"the interpreter's process died at {job}")
      found.append(json.loads(line.removeprefix(VERDICT)))
    return found


def _becomes_ready(
  ready: selectors.BaseSelector, pid: int, timeout: float
) -> bool:
  """Whether there is output before the time is up, or all threads sleep."""
  deadline, looks, last = time.monotonic() + timeout, 0, -1
  while not ready.select(LOOK):
    ticks = _ticks_if_asleep(pid)
    looks = looks + 1 if ticks is not None and ticks == last else 0
    last = -1 if ticks is None else ticks
    if looks == LOOKS or time.monotonic() > deadline:
      return False
  return True


def _ticks_if_asleep(pid: int) -> int | None:
  """The time that a process has run, if no thread of it runs; None elsewhere.

  Only Linux says so.
  """
  try:
    threads = [
      path.read_text().rpartition(")")[2].split()
      for path in pathlib.Path(f"/proc/{pid}/task").glob("*/stat")
    ]
  except OSError:  # A thread has just ended.
    return None
  if not threads or any(state != "S" for state, *_ in threads):
    return None
  return sum(int(fields[11]) + int(fields[12]) for fields in threads)


# --- In the process of its own ------------------------------------------------


class _Planter(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
  """Loads one module of pallas_kernels with a bug in it."""

  def __init__(self, mutant: Mutant):
    path = (ROOT / "pallas_kernels" / mutant.file).resolve()
    source = path.read_text()
    if source.count(mutant.old) != 1:
      raise ValueError(
        f"{mutant.name}: {mutant.old!r} stands {source.count(mutant.old)} "
        f"times in {mutant.file}, not once"
      )
    self.path, self.source = str(path), source.replace(mutant.old, mutant.new)
    parts = path.relative_to(ROOT).with_suffix("").parts
    self.module = ".".join(parts)
    self.is_planted = False

  def find_spec(self, name, path=None, target=None):
    if name != self.module:
      return None
    return importlib.util.spec_from_loader(name, self, origin=self.path)

  def get_filename(self, fullname):
    return self.path

  def get_data(self, path):
    self.is_planted = True
    return self.source.encode()


def _judge(job: Job) -> str:
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

  names = ("pallas_kernels", "tests.pallas_kernels.")
  for name in [n for n in sys.modules if n.startswith(names)]:
    if name != __name__:
      del sys.modules[name]
  planters = [_Planter(job.mutant)] if job.mutant else []
  sys.meta_path[:0] = planters
  module, function = job.check.split(":")
  try:
    getattr(importlib.import_module(module), function)(**job.arguments)
    if planters and not planters[0].is_planted:
      raise ImportError(f"{planters[0].module} was not imported")
    races = interpret_pallas_call.get_races()
    return RACE if races.races_found else SOUND
  except Exception as error:
    if planters and not planters[0].is_planted:
      raise
    interpret_pallas_call.reset_gpu_interpret_mode_state()
    if job.mutant is None:
      traceback.print_exc()
    return f"{type(error).__name__}: {error}"[:500]
  finally:
    del sys.meta_path[: len(planters)]


def main() -> None:
  for line in sys.stdin:
    job = json.loads(line)
    mutant = job.pop("mutant")
    job = Job(**job, mutant=Mutant(**mutant) if mutant else None)
    print(VERDICT + json.dumps(_judge(job)), flush=True)


if __name__ == "__main__":
  main()
