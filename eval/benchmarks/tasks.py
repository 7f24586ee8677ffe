"""Rows of benchmarks as tasks: what is asked, what is right, which category.

The forms of prompts are those of z-lab's benchmark of DFlash, where it has the
benchmark; a published acceptance length belongs to the form it was asked in.
"""

import dataclasses
import re
from typing import Any

Row = dict[str, Any]

STEP_BY_STEP = (
  "\nPlease reason step by step, and put your final answer within \\boxed{}."
)
# What SPEED-Bench publishes where it may not publish the prompt itself.
PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"
# The categories of MT-Bench, which Spec-Bench counts as one.
MT_BENCH = (
  "writing",
  "roleplay",
  "reasoning",
  "math",
  "coding",
  "extraction",
  "stem",
  "humanities",
)


@dataclasses.dataclass(frozen=True)
class Program:
  """What a reply with code is judged by.

  Attributes:
    name: of the function that is asked for; "" if any will do.
    tests: Python that fails unless the function is right.
    prompt: code that the reply continues or repeats; "" if there is none.
  """

  name: str
  tests: str
  prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Task:
  """One row of a benchmark.

  Attributes:
    turns: what the user says.
    reference: the right answer, as text or tests; None if there is none.
    category: or "".
  """

  turns: tuple[str, ...]
  reference: str | Program | None = None
  category: str = ""


class RowError(ValueError):
  """What is wrong with a row: the column, and what was expected."""


# --- Columns ------------------------------------------------------------------


def text(row: Row, *names: str) -> str:
  """The text in the first of these columns that the row has."""
  name, value = _find(row, names)
  if isinstance(value, int) and not isinstance(value, bool):
    value = str(value)
  if not isinstance(value, str) or not value.strip():
    raise RowError(f"column {name!r} needs text")
  return value


def texts(row: Row, *names: str) -> tuple[str, ...]:
  """As `text`, of a list of texts that is not empty."""
  name, value = _find(row, names)
  is_list = isinstance(value, list | tuple) and len(value) > 0
  if not is_list or not all(isinstance(t, str) and t.strip() for t in value):
    raise RowError(f"column {name!r} needs a list of texts")
  return tuple(value)


def _find(row: Row, names: tuple[str, ...]) -> tuple[str, Any]:
  for name in names:
    if name in row:
      return name, row[name]
  raise RowError(
    f"column {' or '.join(map(repr, names))} is missing; it has "
    f"{', '.join(map(repr, row)) or 'none'}"
  )


# --- Mathematics --------------------------------------------------------------


def read_gsm8k(row: Row) -> Task:
  """The answer stands behind ####, after the working."""
  _, mark, answer = text(row, "answer").rpartition("####")
  if not mark:
    raise RowError("column 'answer' needs the result after '####'")
  return Task((text(row, "question") + STEP_BY_STEP,), answer.strip())


def read_math500(row: Row) -> Task:
  """Hendrycks' MATH, the 500 of "Let's verify step by step"."""
  return Task(
    (text(row, "problem") + STEP_BY_STEP,),
    text(row, "answer"),
    text(row, "subject"),
  )


def read_aime25(row: Row) -> Task:
  """Answers are whole numbers from 0 to 999; one is published in degrees."""
  answer = re.fullmatch(r"(\d{1,3})(\^\\circ)?", text(row, "answer").strip())
  if not answer:
    raise RowError("column 'answer' needs a whole number from 0 to 999")
  return Task((text(row, "problem") + STEP_BY_STEP,), answer[1])


# --- Code ---------------------------------------------------------------------


def read_humaneval(row: Row) -> Task:
  """A signature with its docstring, to be completed."""
  prompt, name = text(row, "prompt"), text(row, "entry_point")
  return Task(
    (
      "Write a solution to the following problem and make sure that it passes "
      f"the tests:\n```python\n{prompt}\n```",
    ),
    Program(name, f"{text(row, 'test')}\ncheck({name})\n", prompt),
  )


def read_mbpp(row: Row) -> Task | None:
  """The task alone; of a file with all splits, the test split: ids 11 to 510.

  Only the tests name the function, so replies to this form cannot be expected
  to pass them: read_tested_mbpp shows them.
  """
  number = row.get("task_id")
  if not isinstance(number, int):
    raise RowError("column 'task_id' needs a whole number")
  if not 11 <= number <= 510:
    return None
  tests = "\n".join(texts(row, "test_list"))
  imports = row.get("test_imports") or []
  name = _find_tested(text(row, "code"), tests)
  return Task(
    (text(row, "prompt"),), Program(name, "\n".join([*imports, tests]) + "\n")
  )


def read_tested_mbpp(row: Row) -> Task | None:
  """The form of the paper (arXiv 2108.07732): the task, then its tests."""
  task = read_mbpp(row)
  if task is None:
    return None
  tests = "\n".join(texts(row, "test_list"))
  prompt = (
    "You are an expert Python programmer, and here is your task: "
    f"{task.turns[0]} Your code should pass these tests:\n\n{tests}"
  )
  return dataclasses.replace(task, turns=(prompt,))


def _find_tested(code: str, tests: str) -> str:
  """The function of the model solution that the tests call; "" if unclear."""
  defined = re.findall(r"^(?:def|class)\s+(\w+)", code, re.MULTILINE)
  called = [name for name in defined if re.search(rf"\b{name}\b", tests)]
  return called[-1] if called else ""


def read_livecodebench(row: Row) -> Task:
  """The question, and starter code where there is some."""
  question = text(row, "question_content")
  starter = row.get("starter_code") or ""
  shape = (
    f"Use the following code structure:\n```python\n{starter}\n```"
    if starter
    else "Write your code in the following format:\n```python\n# YOUR CODE "
    "HERE\n```"
  )
  prompt = (
    "You are an expert Python programmer. You will be given a question "
    "(problem specification) and will generate a correct Python program that "
    "matches the specification and passes all tests. You will NOT return "
    f"anything except for the program\n\n### Question:\n{question}\n\n"
    f"### Format: {shape}\n\n"
    "### Answer: (use the provided format with backticks)"
  )
  return Task((prompt,), category=text(row, "difficulty"))


# --- Conversation, and mixtures -----------------------------------------------


def read_mt_bench(row: Row) -> Task:
  """Two turns; FastChat calls the column turns, the hub's copy prompt."""
  turns = texts(row, "turns", "prompt")
  if len(turns) != 2:
    raise RowError(f"MT-Bench asks in two turns, not {len(turns)}")
  return Task(turns, category=text(row, "category"))


def read_alpaca(row: Row) -> Task:
  """The instruction, and its input where it has one."""
  given = row.get("input")
  if not isinstance(given, str):
    raise RowError("column 'input' needs text, which may be empty")
  more = f"\n\nInput:\n{given}" if given else ""
  return Task((text(row, "instruction") + more,))


def read_spec_bench(row: Row) -> Task:
  """Six tasks, of which MT-Bench has eight categories of its own."""
  category = text(row, "category")
  return Task(
    texts(row, "turns"),
    category="mt_bench" if category in MT_BENCH else category,
  )


def read_speed_bench(row: Row) -> Task:
  """Prompts as NVIDIA's prepare_data.py completes them."""
  turns = texts(row, "turns")
  if any(turn.startswith(PLACEHOLDER) for turn in turns):
    raise RowError(
      "a placeholder stands for the prompt, as published; complete the data "
      "with prepare_data.py of NVIDIA's Model-Optimizer, "
      "examples/specdec_bench, and use the test.parquet that it writes"
    )
  return Task(turns, category=text(row, "category"))
