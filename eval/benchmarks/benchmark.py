"""A benchmark, loaded: prompts, what is right, and where all came from."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterable
from typing import Any

from dflash_jax.config import ConfigError
from dflash_jax.prompts import Prompt, PromptError
from eval.benchmarks import files, hub
from eval.benchmarks.catalog import ENTRIES, NAMES, Entry
from eval.benchmarks.files import Place
from eval.benchmarks.tasks import Program, Row, RowError, Task

SEED = 42  # the field's


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """Prompts of a benchmark, and how to judge the replies.

  Attributes:
    name: as --benchmark takes it.
    prompts: what the user says.
    references: per prompt, the right answer; None where there is none.
    categories: per prompt, or "".
    scored: what makes a reply right, or "" if nothing checks it.
    facts: for the record: source, number, seed, prompt form, and a digest of
      the prompts, by which two runs know that they asked the same.
  """

  name: str
  prompts: list[Prompt]
  references: list[str | Program | None]
  categories: list[str]
  scored: str
  facts: dict[str, Any]


def load(
  name: str,
  data_dir: str = "",
  limit: int = 0,
  seed: int = SEED,
  run_code: bool = False,
) -> Benchmark:
  """Reads a benchmark, shuffles it, and takes the first `limit` tasks.

  Args:
    name: one of NAMES.
    data_dir: holds its files in a folder of its name; "" asks the hub.
    limit: tasks kept; 0 for all.
    seed: of the order, which does not depend on the limit.
    run_code: ask as the tests need it, where that differs.

  Raises:
    ConfigError: the name is unknown.
    PromptError: no data, or damaged data.
  """
  entry = _find(name)
  if data_dir:
    paths = files.find(entry, data_dir)
    places, source = files.read(paths), ", ".join(map(str, paths))
  else:
    places, source = hub.fetch(entry), hub.source(entry)
  read, form = entry.read, entry.form
  if run_code and entry.read_tested:
    read, form = entry.read_tested, entry.tested_form
  tasks = _read(places, read)
  if not tasks:
    raise PromptError(
      f"benchmark {name}: {source} holds no task of the {entry.split} split; "
      "get the file again"
    )
  random.Random(seed).shuffle(tasks)
  chosen = tasks[: limit or None]
  return Benchmark(
    name=name,
    prompts=[Prompt(task.turns) for task in chosen],
    references=[task.reference for task in chosen],
    categories=[task.category for task in chosen],
    scored=entry.scored,
    facts={
      "name": name,
      "source": source,
      "prompts": len(chosen),
      "of": len(tasks),
      "seed": seed,
      "order": "shuffled by random.Random(seed), then the first ones",
      "prompt_form": form,
      "prompts_sha256": _digest(chosen),
    },
  )


def _find(name: str) -> Entry:
  for entry in ENTRIES:
    if entry.name == name:
      return entry
  raise ConfigError(
    f"--benchmark={name} is unknown; choose from {', '.join(NAMES)}"
  )


def _read(
  places: Iterable[Place], read: Callable[[Row], Task | None]
) -> list[Task]:
  tasks = []
  for where, row in places:
    try:
      task = read(row)
    except RowError as error:
      raise PromptError(f"{where}: {error}") from error
    if task is not None:
      tasks.append(task)
  return tasks


def _digest(tasks: list[Task]) -> str:
  turns = json.dumps([task.turns for task in tasks])
  return hashlib.sha256(turns.encode()).hexdigest()
