"""Runs the project's programs as a user does, kills and all."""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 500  # seconds; a starved machine is slow


def environment(cache: pathlib.Path) -> dict[str, str]:
  """Compilations are shared: every process compiles the same few things."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def run(
  module: str,
  *arguments: str,
  cache: pathlib.Path,
  kill_when: Callable[[], bool] | None = None,
  file_limit: int | None = None,
) -> subprocess.CompletedProcess[str]:
  """Runs `python -m module` in the repository's root.

  Args:
    module: its name.
    *arguments: of the command line.
    cache: directory of compiled code.
    kill_when: sends SIGKILL as soon as this is true.
    file_limit: most bytes of a file it may write, like a full disk.
  """
  process = subprocess.Popen(
    [sys.executable, "-m", module, *arguments],
    cwd=ROOT,
    env=environment(cache),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  if file_limit is not None:  # long before it has read its imports
    limits = (file_limit, file_limit)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
  deadline = time.monotonic() + TIMEOUT
  if kill_when is not None:
    while process.poll() is None and not kill_when():
      assert time.monotonic() < deadline, "never came to the point"
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  try:
    out, err = process.communicate(timeout=TIMEOUT)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def failed_clearly(result: subprocess.CompletedProcess[str]) -> str:
  """The one line that a failed program ends with."""
  assert result.returncode == 2, result.stderr
  assert "Traceback" not in result.stderr
  lines = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
  assert len(lines) == 1, result.stderr
  return lines[0]
