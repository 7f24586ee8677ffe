"""The process that runs one program of a model; started by trials.py alone.

It gives up what it can before it runs a line of the program: privileges,
network, changes to files, memory, other processes, output. That keeps accidents
in. It is no boundary against a program that means to break out.

Run as a script by a bare interpreter, so it imports the standard library only.
"""

import ctypes
import json
import os
import resource
import sys
import types
from typing import Any

NOBODY = 65534
# How a cell ends before the program starts.
CANNOT_ISOLATE = 71

# Of prctl(2).
_SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 4, 38
# Of landlock(7): system calls, the same on all machines, and the rights to
# write, remove, make and truncate files, with the version that brought them.
_CREATE_RULESET, _RESTRICT_SELF, _ASK_VERSION = 444, 446, 1
_CHANGES = {1: (1, *range(4, 13)), 2: (13,), 3: (14,)}
_LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
  """Reads a job from standard input, runs it, tells of it in a pipe."""
  job = json.loads(sys.stdin.buffer.read())
  nothing = os.open(os.devnull, os.O_RDWR)
  _be_nobody()
  if job["isolate"]:
    try:
      _leave_network()
      _leave_files()
    except OSError as error:
      print(error.strerror, file=sys.stderr)
      sys.exit(CANNOT_ISOLATE)
  _limit(job["memory_bytes"])
  for stream in (0, 1, 2):
    os.dup2(nothing, stream)
  pipe = job["pipe"]
  try:
    _run(job["solution"], job["tests"])
  # Whatever ends the program early: also SystemExit, and a lack of memory.
  except BaseException as error:
    os.write(pipe, type(error).__name__.encode()[:100])
    os._exit(1)
  # Only here is it known that the tests came to their end.
  os.write(pipe, job["password"].encode())
  os._exit(0)


def _run(solution: str, tests: str) -> None:
  """Runs both as one module, which is not __main__."""
  module = types.ModuleType("solution")
  sys.modules["solution"] = module
  for name, code in (("solution", solution), ("tests", tests)):
    exec(compile(code, f"<{name}>", "exec"), module.__dict__)


def _be_nobody() -> None:
  """Gives up root, where a limit of processes would not hold."""
  if os.getuid() != 0:
    return
  # A library that only root may look into stays open, directory by directory.
  moved = {
    path: f"/proc/self/fd/{os.open(path, os.O_PATH | os.O_DIRECTORY)}"
    for path in sys.path
    if os.path.isdir(path)
  }
  os.setgroups([])
  os.setgid(NOBODY)
  os.setuid(NOBODY)
  # Else /proc/self would still be root's.
  _LIBC.prctl(_SET_DUMPABLE, 1, 0, 0, 0)
  sys.path[:] = moved.values()
  for module in list(sys.modules.values()):
    for path in getattr(module, "__path__", []):
      parent, _, name = path.rpartition("/")
      if parent in moved:
        module.__path__ = [f"{moved[parent]}/{name}"]


def _leave_network() -> None:
  """Into a network of its own, which has no device that is up."""
  os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)


def _leave_files() -> None:
  """Gives up the right to change any file or directory, for good."""
  none = ctypes.c_size_t(0)
  version = _call(_CREATE_RULESET, None, none, _ASK_VERSION)
  rights = [r for v, rs in _CHANGES.items() if v <= version for r in rs]
  mask = ctypes.c_uint64(sum(1 << right for right in rights))
  size = ctypes.c_size_t(ctypes.sizeof(mask))
  rules = _call(_CREATE_RULESET, ctypes.byref(mask), size, 0)
  _LIBC.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
  _call(_RESTRICT_SELF, rules, 0)
  os.close(rules)


def _call(*arguments: Any) -> int:
  result = _LIBC.syscall(*arguments)
  if result < 0:
    error = ctypes.get_errno()
    raise OSError(error, f"landlock: {os.strerror(error)}")
  return result


def _limit(memory_bytes: int) -> None:
  """No more than this memory, no other process, not a byte into files."""
  limits = {
    resource.RLIMIT_AS: memory_bytes,
    resource.RLIMIT_NPROC: 0,
    resource.RLIMIT_FSIZE: 0,
    resource.RLIMIT_CORE: 0,
    resource.RLIMIT_NOFILE: 64,
  }
  for limit, most in limits.items():
    resource.setrlimit(limit, (most, most))


if __name__ == "__main__":
  main()
