"""Runs a program many times for one import of it.

    python -m tests.forked MODULE < LINES

Every line is the arguments of one run, as JSON. A run is a fork of a process
that has imported the module and done nothing else, no device started, and tells
of itself in a line: returncode, stdout, stderr.
"""

import importlib.util
import json
import os
import runpy
import sys
import tempfile


def main() -> None:
  """Entry point."""
  module = sys.argv[1]
  spec = importlib.util.find_spec(module)
  is_package = spec is not None and spec.submodule_search_locations is not None
  name = f"{module}.__main__" if is_package else module
  importlib.import_module(name)
  del sys.modules[name]  # it runs anew, under the name __main__
  for line in sys.stdin:
    print(json.dumps(fork(name, json.loads(line))), flush=True)


def fork(name: str, arguments: list[str]) -> dict[str, int | str]:
  """One run of a module that is not imported, but all it needs is."""
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    child = os.fork()
    if child == 0:
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # not the other runs' lines
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      sys.argv = [name, *arguments]
      runpy.run_module(name, run_name="__main__", alter_sys=True)
      sys.exit(0)
    _, status = os.waitpid(child, 0)
    told: dict[str, int | str] = {
      "returncode": os.waitstatus_to_exitcode(status)
    }
    for key, file in (("stdout", out), ("stderr", err)):
      file.seek(0)
      told[key] = file.read().decode()
    return told


if __name__ == "__main__":
  main()
