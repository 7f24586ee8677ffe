"""Training runs as processes of their own: some at a time, each on its cores.

A process takes its memory and its compiled code with it when it ends, and one
that fails takes no other along.
"""

import collections
import contextlib
import dataclasses
import fcntl
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dflash_jax.config import Config
from train.files import FileError, make_directory

POLL_S = 0.1
LOCK = ".lock"
LOG = "log.txt"


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
  """A run of train.main.

  Attributes:
    command: with its arguments.
    workdir: whose log.txt gets all it says.
  """

  command: list[str]
  workdir: pathlib.Path

  @property
  def last_words(self) -> str:
    """The last line of its log: of a failure, the reason."""
    lines = (self.workdir / LOG).read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def train_command(
  path: str, given: Config, wanted: Config, workdir: pathlib.Path, resume: bool
) -> list[str]:
  """The command that trains as `wanted`, by flags alone.

  Args:
    path: of a config file. given: what it says.
    wanted: differs from it in fields that flags can set.
    workdir: of the run.
    resume: from its newest checkpoint.
  """
  flags = [
    f"--config.{name}={value if isinstance(value, str) else repr(value)}"
    for name, value in differences(given, wanted).items()
    if not name.startswith("ablation.")
  ]
  return [
    *(sys.executable, "-m", "train.main", f"--config={path}", *flags),
    f"--workdir={workdir}",
    *(["--resume"] if resume else []),
  ]


def differences(given: Any, wanted: Any, path: str = "") -> dict[str, Any]:
  """Fields of two configs that differ, by dotted name, as `wanted` has them."""
  found: dict[str, Any] = {}
  for field in dataclasses.fields(given):
    old, new = getattr(given, field.name), getattr(wanted, field.name)
    name = f"{path}{field.name}"
    if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
      found |= differences(old, new, f"{name}.")
    elif old != new:
      found[name] = new
  return found


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[int]:
  """Holds a directory; gives the descriptor that holds it.

  Processes that inherit the descriptor hold it too: runs that outlive a killed
  parent keep a second one from writing beside them.

  Raises:
    FileError: if somebody else does.
  """
  path = make_directory(workdir) / LOCK
  with path.open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise FileError(
        f"{workdir} is in use by another train.ablate or by runs that it left "
        "behind; wait for them or end them"
      ) from error
    yield file.fileno()


def run_all(
  jobs: Sequence[Job],
  at_once: int,
  lock: int,
  on_end: Callable[[Job, int], None],
) -> None:
  """Runs jobs in order.

  Args:
    jobs: to run.
    at_once: how many; the machine's cores are shared out among them.
    lock: descriptor that they inherit.
    on_end: told of each job that has ended, with its exit status, while others
      go on.
  """
  waiting = collections.deque(jobs)
  running: dict[subprocess.Popen[bytes], tuple[Job, list[int]]] = {}
  free = split_cores(at_once)

  def fill() -> None:
    while waiting and free:
      job, cores = waiting.popleft(), free.pop(0)
      running[_start(job, cores, lock)] = job, cores

  try:
    fill()
    while running:
      ended = [process for process in running if process.poll() is not None]
      if not ended:
        time.sleep(POLL_S)
        continue
      finished = [(process, *running.pop(process)) for process in ended]
      free += [cores for _, _, cores in finished]
      fill()  # cores stay busy while the caller looks at results
      for process, job, _ in finished:
        on_end(job, process.returncode)
  finally:
    for process in running:
      process.terminate()
    for process in running:
      process.wait()


def split_cores(at_once: int) -> list[list[int]]:
  """The cores that each of `at_once` jobs may use; [] where that is unknown."""
  if not hasattr(os, "sched_getaffinity"):
    return [[] for _ in range(at_once)]
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < at_once:
    return [cores for _ in range(at_once)]
  return [cores[place::at_once] for place in range(at_once)]


def _start(job: Job, cores: list[int], lock: int) -> subprocess.Popen[bytes]:
  make_directory(job.workdir)
  with (job.workdir / LOG).open("ab") as log:
    process = subprocess.Popen(
      job.command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      pass_fds=(lock,),
    )
  if cores:
    # Before it has imported JAX, which counts the cores it may use.
    with contextlib.suppress(ProcessLookupError):
      os.sched_setaffinity(process.pid, cores)
  return process
