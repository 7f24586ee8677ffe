"""Runs the project's programs as a user does, kills and full disks included."""

import os
import pathlib
import resource
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT = 500  # seconds; a starved machine is slow


def run(
  program: str,
  *arguments: str,
  cache: pathlib.Path,
  kill_at: tuple[str, int] | None = None,
  file_limit: int | None = None,
) -> subprocess.CompletedProcess[str]:
  """Runs `python -m program` in the repository's root.

  Args:
    program: a module.
    *arguments: of the command line.
    cache: directory of compiled code, which every process can share.
    kill_at: ("module:function", N): SIGKILL comes at its Nth call.
    file_limit: most bytes of a file it may write, like a full disk.
  """
  modules = [program]
  if kill_at is not None:
    modules = ["tests.train.killed", *map(str, kill_at), program]
  process = subprocess.Popen(
    [sys.executable, "-m", *modules, *arguments],
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  if file_limit is not None:  # long before it has read its imports
    limits = (file_limit, file_limit)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
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
