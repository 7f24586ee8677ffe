"""Runs programs that a model wrote, against the tests of a benchmark.

Off unless asked for: whoever runs a model's programs should do so in a
container or a virtual machine. What cell.py shuts off keeps accidents in, not
attackers.
"""

import dataclasses
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile

from dflash_jax.config import ConfigError
from eval.benchmarks import cell

_CELL = pathlib.Path(cell.__file__)
_REPORT_BYTES = 1024


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a program may use.

  Attributes:
    seconds: by the clock, the interpreter's start included.
    memory_bytes: of address space.
    isolate: shut off the network and all changes to files; a kernel that does
      not allow it is an error.
  """

  seconds: float = 10.0
  memory_bytes: int = 2**30
  isolate: bool = True


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a program did: passed, or why not ("AssertionError", "time", ...)."""

  passed: bool
  reason: str = ""


def check(limits: Limits) -> None:
  """Raises ConfigError where programs cannot be run as the limits say."""
  if not sys.platform.startswith("linux"):
    raise ConfigError(
      f"--run_code needs Linux, to confine programs; this is {sys.platform}"
    )
  found = run("", "", limits)
  if not found.passed:
    raise ConfigError(
      f"--run_code: an empty program does not pass here ({found.reason}); the "
      "reason must be found first"
    )


def run(solution: str, tests: str, limits: Limits) -> Outcome:
  """Runs a solution, then its tests, in a process of its own.

  A program passes if its tests came to their end, and only then: it is not
  enough to end without an error.

  Raises:
    ConfigError: the kernel does not allow isolation.
  """
  password = secrets.token_hex(16)
  reader, writer = os.pipe()
  job = {
    "solution": solution,
    "tests": tests,
    "password": password,
    "pipe": writer,
    "isolate": limits.isolate,
    "memory_bytes": limits.memory_bytes,
  }
  with (
    os.fdopen(reader, "rb", buffering=0) as pipe,
    tempfile.TemporaryDirectory(prefix="dflash-trial-") as directory,
  ):
    try:
      os.chmod(directory, 0o755)
      process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CELL)],
        cwd=directory,
        env={},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=(writer,),
        start_new_session=True,
      )
    finally:
      os.close(writer)
    text = json.dumps(job).encode()
    errors, is_late = _finish(process, text, limits.seconds)
    report = b"" if is_late else pipe.read(_REPORT_BYTES)
  if process.returncode == cell.CANNOT_ISOLATE:
    raise ConfigError(
      "--run_code=isolated: this machine does not let a process shut off its "
      f"network and files ({errors.decode().strip()}); allow user namespaces "
      "and Landlock, or take a container without a network and "
      "--run_code=unisolated"
    )
  if errors:  # The program cannot write there.
    raise RuntimeError(f"{_CELL.name} failed:\n{errors.decode()}")
  if report == password.encode():
    return Outcome(passed=True)
  return Outcome(False, _explain(is_late, report, process.returncode))


def _finish(
  process: subprocess.Popen[bytes], text: bytes, seconds: float
) -> tuple[bytes, bool]:
  """What it wrote on stderr before the program, and whether it was killed."""
  try:
    return process.communicate(text, timeout=seconds)[1], False
  except subprocess.TimeoutExpired:
    return b"", True
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
      process.communicate()


def _explain(is_late: bool, report: bytes, code: int) -> str:
  if is_late:
    return "time"
  if report:
    return report.decode(errors="replace")
  return f"ended before its tests did, code {code}"
