"""Compiles every kernel to machine code for GPUs that are not here, and looks.

    make aot
    python -m pallas_kernels.compile_check --targets=b200,h100 --only=lm_head

One process per target: the compiler keeps the architecture of its first kernel.
For each kernel at each shape: what it was assembled for, its tensor core
instructions, registers, spills, shared and tensor memory, against the budgets
of its config.py. Needs the packages of the extra `aot`, and no GPU.
"""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from pallas_kernels import ahead
from pallas_kernels.cases import Budget, Case

# Target -> what its kernels must have been assembled for, and implementation.
ASSEMBLED = {
  "b200": ("sm_100a", "sm100"),
  "gb200": ("sm_100a", "sm100"),
  "b300": ("sm_103a", "sm100"),
  "h100": ("sm_90a", "sm90"),
}
OPERATIONS = ("lm_head_verify",)
TIMEOUT = 900  # seconds for one target
RESULT = "compiled: "  # begins a line of a child's output


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the kernels of one case became; of several, the largest figures."""

  name: str
  target: str
  assembled: str
  instructions: int
  registers: int
  spilled: int
  shared_bytes: int
  tensor_columns: int
  seconds: float

  def faults(self, budget: Budget) -> list[str]:
    """What is wrong with it; nothing, if all is well."""
    wanted = ASSEMBLED[self.target][0]
    found = []
    if self.assembled != wanted:
      found.append(f"assembled for {self.assembled}, not {wanted}")
    if budget.instruction and not self.instructions:
      found.append(f"no {budget.instruction} in it")
    if self.spilled:
      found.append(f"{self.spilled} bytes spilled")
    for name in ("registers", "shared_bytes", "tensor_columns"):
      taken, limit = getattr(self, name), getattr(budget, name)
      if taken > limit:
        found.append(f"{name} {taken} > {limit}")
    return found


def cases(architecture: str, only: str = "") -> list[tuple[Case, Budget]]:
  """All cases whose names hold `only`, with the budget of their operation."""
  found = []
  for operation in OPERATIONS:
    package = f"pallas_kernels.{operation}"
    shapes = importlib.import_module(f"{package}.shapes")
    config = importlib.import_module(f"{package}.config")
    found += [
      (case, config.BUDGETS[architecture])
      for case in shapes.cases()
      if only in case.name
    ]
  return found


# --- In a process of its own --------------------------------------------------


def compile_target(target: str, only: str, dumps: pathlib.Path) -> None:
  """Compiles the cases for one target, and prints a line for each.

  Args:
    target: a key of ASSEMBLED.
    only: part of the names of the cases wanted.
    dumps: where the compiler leaves what it made, as the environment says.
  """
  architecture = ASSEMBLED[target][1]
  for case, budget in cases(architecture, only):
    call = functools.partial(case.call, implementation=architecture)
    before, start = set(dumps.iterdir()), time.perf_counter()
    ahead.compile_for(target, call, case.operands)
    seconds = time.perf_counter() - start
    made = sorted(set(dumps.iterdir()) - before)
    result = examine(case.name, target, made, budget.instruction, seconds)
    print(RESULT + json.dumps(dataclasses.asdict(result)), flush=True)


def examine(
  name: str,
  target: str,
  files: list[pathlib.Path],
  instruction: str | None,
  seconds: float,
) -> Compiled:
  """Reads what the compiler left of one case.

  Raises:
    ValueError: files that do not say what they should.
  """
  texts = {path: path.read_text(errors="replace") for path in files}
  assembly = _join(texts, ".ptxas")
  resources = _join(texts, ".resources.txt")
  machine_code = _join(texts, "sass")
  architectures = sorted(set(_all(r"for '(sm_\w+)'", assembly)))

  def largest(pattern: str, text: str) -> int:
    return max(map(int, _all(pattern, text)))

  return Compiled(
    name=name,
    target=target,
    assembled=" ".join(architectures),
    instructions=machine_code.count(instruction) if instruction else 0,
    registers=largest(r"Used (\d+) registers", assembly),
    spilled=largest(r"(\d+) bytes spill stores", assembly),
    shared_bytes=largest(r"smem_scratch_bytes\D+(\d+)", resources),
    tensor_columns=largest(r"tmem_scratch_cols\D+(\d+)", resources),
    seconds=round(seconds, 2),
  )


def _join(texts: dict[pathlib.Path, str], part: str) -> str:
  return "\n".join(text for path, text in texts.items() if part in path.name)


def _all(pattern: str, text: str) -> list[str]:
  found = re.findall(pattern, text)
  if not found:
    raise ValueError(f"no {pattern!r} in what the compiler left")
  return found


# --- The command --------------------------------------------------------------


def run_target(target: str, only: str) -> tuple[list[Compiled], str]:
  """Compiles for one target; its results, and the error output if it failed."""
  with tempfile.TemporaryDirectory() as dumps:
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "MOSAIC_GPU_DUMP_TO": dumps,
    }
    command = [sys.executable, "-m", __spec__.name]
    flags_ = [f"--child={dumps}", f"--targets={target}", f"--only={only}"]
    try:
      done = subprocess.run(
        command + flags_,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
      )
      output, errors = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as slow:
      output = (slow.stdout or b"").decode()
      errors = f"not done after {TIMEOUT} s"
  lines = output.splitlines()
  results = [
    Compiled(**json.loads(line.removeprefix(RESULT)))
    for line in lines
    if line.startswith(RESULT)
  ]
  return results, errors


def report(targets: list[str], only: str) -> bool:
  """Prints the table; whether every kernel is as it should be."""
  sound = True
  print(
    f"{'case':42} {'target':6} {'assembled':9} {'MMAs':>4} {'registers':>9} "
    f"{'shared':>7} {'tensor':>6} {'s':>5}"
  )
  for target in targets:
    budgets = {
      case.name: budget for case, budget in cases(ASSEMBLED[target][1], only)
    }
    results, errors = run_target(target, only)
    for result in results:
      faults = result.faults(budgets.pop(result.name))
      sound &= not faults
      print(
        f"{result.name:42} {target:6} {result.assembled:9} "
        f"{result.instructions:4} {result.registers:9} "
        f"{result.shared_bytes:7} {result.tensor_columns:6} "
        f"{result.seconds:5.1f}  {'; '.join(faults) or 'ok'}"
      )
    if errors or budgets:
      sound = False
      print(f"{target}: {len(budgets)} cases were not compiled\n{errors}")
  return sound


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  values = flags.FLAGS
  unknown = sorted(set(values.targets) - set(ASSEMBLED))
  if unknown or not values.targets:
    raise app.UsageError(
      f"--targets={','.join(values.targets)}: choose among {', '.join(ASSEMBLED)}"
    )
  if values.child:
    (target,) = values.targets
    compile_target(target, values.only, pathlib.Path(values.child))
  elif not report(values.targets, values.only):
    sys.exit(1)


if __name__ == "__main__":
  flags.DEFINE_list(
    "targets", ["b200", "b300", "h100"], f"GPUs: {', '.join(ASSEMBLED)}."
  )
  flags.DEFINE_string("only", "", "Part of the names of the cases wanted.")
  flags.DEFINE_string("child", "", "Internal: compile here, dumps go to this.")
  app.run(main)
