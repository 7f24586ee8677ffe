"""Runs a program that kills itself on its way, as the power might.

    python -m tests.train.killed MODULE:FUNCTION N PROGRAM [ARGUMENT ...]

SIGKILL comes as the program calls the function for the Nth time.
"""

import functools
import importlib
import itertools
import os
import runpy
import signal
import sys


def main() -> None:
  """Arms the function, then runs the program."""
  place, number, program = sys.argv[1:4]
  module, _, path = place.partition(":")
  *owners, name = path.split(".")
  owner = functools.reduce(getattr, owners, importlib.import_module(module))
  function, calls = getattr(owner, name), itertools.count(1)

  def fatal(*arguments, **options):
    if next(calls) == int(number):
      os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)

  setattr(owner, name, fatal)
  sys.argv = sys.argv[3:]
  runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
