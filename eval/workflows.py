"""Workflows: graphs of dependent requests, written a line per call.

    WORKFLOW/CALL[*COPIES] [continues CALL] [after CALL,CALL] [key=value]: TEXT

    team/planner tokens=48: Write a plan of four steps. Task: {task}
    team/worker*4 after planner: The plan: {planner} Do step {copy} of it.
    team/writer after worker: Write the answer. Notes: {worker}

A call opens a conversation with its text, or goes on with that of the call it
`continues`: copy by copy, or all from an only one. It is sent when all copies
of what it continues and comes `after` have answered. Fields of the text are
{task}; {copy}, counted from 1; and {CALL}, what all copies of that call said
but the one whose conversation goes on, which holds it already. Keys: tokens,
the longest reply; role, of the text, "user" unless it is a "tool"'s answer;
temperature, top_k, top_p, min_p.
"""

import dataclasses
import graphlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dflash_jax.config import ConfigError
from dflash_jax.sampling import Sampling

_EXAMPLE = "'team/writer after worker tokens=64: Write the answer. {worker}'"
_CALL = re.compile(r"([A-Za-z]\w*)/([A-Za-z]\w*)(?:\*([1-9]\d*))?")
_FIELD = re.compile(r"\{([A-Za-z]\w*)\}")
_LAW = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
_KEYS = {"tokens": int, "role": str, **_LAW}
_OWN_FIELDS = ("task", "copy")


@dataclasses.dataclass(frozen=True)
class Call:
  """A request of a workflow, or several alike.

  Attributes:
    name: in its workflow.
    text: what is said, with its fields.
    copies: requests it stands for.
    continues: the call whose conversation goes on; "" opens one.
    after: calls whose replies it waits for, besides.
    role: of whoever says the text.
    tokens: longest reply; 0 takes config.agents.max_new_tokens.
    sampling: the target's law.
  """

  name: str
  text: str
  copies: int = 1
  continues: str = ""
  after: tuple[str, ...] = ()
  role: str = "user"
  tokens: int = 0
  sampling: Sampling = Sampling()

  @property
  def needs(self) -> tuple[str, ...]:
    """Calls that must have answered before."""
    continued = (self.continues,) if self.continues else ()
    return (*continued, *self.after)

  @property
  def fields(self) -> tuple[str, ...]:
    """Names in braces in the text, in order."""
    return tuple(_FIELD.findall(self.text))

  def say(
    self, copy: int, task: str, replies: Mapping[str, Sequence[str]]
  ) -> str:
    """The text, its fields filled in.

    Args:
      copy: which of the copies, from 0.
      task: of the chain.
      replies: of each call it needs, copy by copy.
    """

    def fill(field: re.Match[str]) -> str:
      name = field[1]
      if name == "task":
        return task
      if name == "copy":
        return str(copy + 1)
      held = copy if name == self.continues else None
      return _join(name, replies[name], held)

    return _FIELD.sub(fill, self.text)


def _join(name: str, replies: Sequence[str], held: int | None) -> str:
  """All replies but one, each with its name if the call has several."""
  texts = [text.strip() for text in replies]
  if len(texts) > 1:
    texts = [f"{name} {i}: {text}" for i, text in enumerate(texts, start=1)]
  return "\n".join(text for i, text in enumerate(texts) if i != held)


@dataclasses.dataclass(frozen=True)
class Workflow:
  """A graph of calls without cycles."""

  name: str
  calls: tuple[Call, ...]

  @property
  def num_requests(self) -> int:
    """Of one chain."""
    return sum(call.copies for call in self.calls)

  @property
  def levels(self) -> dict[str, int]:
    """Per call, how many requests come before it, one after the other."""
    needs = {call.name: call.needs for call in self.calls}
    levels: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(needs).static_order():
      levels[name] = 1 + max((levels[n] for n in needs[name]), default=-1)
    return levels

  @property
  def depth(self) -> int:
    """Requests of the longest path."""
    return 1 + max(self.levels.values())

  @property
  def breadth(self) -> int:
    """Most requests of one level."""
    levels = self.levels
    return max(
      sum(call.copies for call in self.calls if levels[call.name] == level)
      for level in range(self.depth)
    )


def parse(lines: Sequence[str]) -> dict[str, Workflow]:
  """The workflows that the lines describe, by name, in order.

  Raises:
    ConfigError: for a line or a graph that makes no sense.
  """
  workflows: dict[str, dict[str, Call]] = {}
  for line in lines:
    name, call = _parse_line(line)
    calls = workflows.setdefault(name, {})
    if call.name in calls:
      raise _wrong(name, call, "stands there twice; give one another name")
    calls[call.name] = call
  for name, calls in workflows.items():
    for call in calls.values():
      _check(name, call, calls)
    _check_order(name, calls)
  return {
    name: Workflow(name, tuple(calls.values()))
    for name, calls in workflows.items()
  }


def choose(
  workflows: Mapping[str, Workflow], names: Sequence[str]
) -> list[Workflow]:
  """Workflows by name; all of them if there are no names."""
  unknown = [name for name in names if name not in workflows]
  if unknown:
    raise ConfigError(
      f"workflow {unknown[0]!r} is unknown; config.agents.calls has "
      f"{', '.join(workflows) or 'none'}"
    )
  if not workflows:
    raise ConfigError(
      f"config.agents.calls is empty; write lines like {_EXAMPLE}, or take "
      "--config=configs/agents.py"
    )
  return [workflows[name] for name in names or workflows]


# --- A line -------------------------------------------------------------------


def _parse_line(line: str) -> tuple[str, Call]:
  """A line's workflow and call, as far as the line alone can be judged."""
  head, colon, text = line.partition(":")
  where = f"config.agents.calls, {head.strip()[:60]!r}:"
  if not colon or not text.strip():
    raise ConfigError(f"{where} no text; write a line like {_EXAMPLE}")
  first, *words = head.split() or [""]
  found = _CALL.fullmatch(first)
  if found is None:
    raise ConfigError(
      f"{where} {first!r} is not WORKFLOW/CALL or WORKFLOW/CALL*COPIES; write "
      f"a line like {_EXAMPLE}"
    )
  workflow, name, copies = found.groups()
  settings = _parse_words(words, where)
  law = {key: settings.pop(key) for key in _LAW if key in settings}
  try:
    sampling = Sampling(**law)
  except ConfigError as error:
    raise ConfigError(f"{where} {error}") from error
  call = Call(
    name, text.strip(), int(copies or 1), sampling=sampling, **settings
  )
  if name in _OWN_FIELDS:
    raise _wrong(workflow, call, f"is what {{{name}}} means; rename the call")
  return workflow, call


def _parse_words(words: Sequence[str], where: str) -> dict[str, Any]:
  """What follows the name in a line's head."""
  settings: dict[str, Any] = {}
  rest = iter(words)
  for word in rest:
    key, is_setting, value = word.partition("=")
    if key in ("continues", "after") and not is_setting:
      value = next(rest, "")
    elif key not in _KEYS or not is_setting:
      known = ", ".join(f"{known}=" for known in _KEYS)
      raise ConfigError(
        f"{where} {word!r} is unknown; use continues CALL, after CALL,CALL, "
        f"{known}"
      )
    if key in settings:
      raise ConfigError(f"{where} {key} stands there twice; keep one")
    settings[key] = _read(key, value, where)
  return settings


def _read(key: str, value: str, where: str) -> Any:
  """A value, of its key's type."""
  if not value.strip(","):
    raise ConfigError(f"{where} {key} has no value; give one, or drop it")
  if key == "after":
    return tuple(name for name in value.split(",") if name)
  kind = _KEYS.get(key, str)
  try:
    found = kind(value)
  except ValueError as error:
    raise ConfigError(
      f"{where} {key} takes a value of type {kind.__name__}, not {value!r}"
    ) from error
  if key == "tokens" and found < 1:
    raise ConfigError(f"{where} tokens={value} is impossible; use at least 1")
  return found


# --- A graph ------------------------------------------------------------------


def _check(workflow: str, call: Call, calls: Mapping[str, Call]) -> None:
  """Raises ConfigError for names that lead nowhere."""
  others = ", ".join(name for name in calls if name != call.name) or "none"
  for name in call.needs:
    if name not in calls:
      raise _wrong(
        workflow, call, f"waits for {name!r}, which is unknown; known: {others}"
      )
  for name in call.fields:
    if name in _OWN_FIELDS or name in call.needs:
      continue
    remedy = f"known: task, copy, {others}"
    if name in calls:
      remedy = f"it does not wait for it; add 'after {name}'"
    raise _wrong(workflow, call, f"shows {{{name}}}, but {remedy}")
  if not call.continues:
    return
  source = calls[call.continues]
  if source.copies not in (1, call.copies):
    raise _wrong(
      workflow,
      call,
      f"has {call.copies} copies, but continues {source.name!r} of "
      f"{source.copies}; make it {source.copies}, or let it continue one",
    )
  if source.copies == 1 and source.name in call.fields:
    raise _wrong(
      workflow,
      call,
      f"shows {{{source.name}}}, which its conversation holds already; drop it",
    )


def _check_order(workflow: str, calls: Mapping[str, Call]) -> None:
  """Raises ConfigError if calls wait for each other."""
  needs = {name: call.needs for name, call in calls.items()}
  try:
    graphlib.TopologicalSorter(needs).prepare()
  except graphlib.CycleError as error:
    cycle = " -> ".join(error.args[1])
    raise ConfigError(
      f"config.agents.calls, workflow {workflow!r}: calls wait for each other: "
      f"{cycle}; drop one 'after' or 'continues' of them"
    ) from error


def _wrong(workflow: str, call: Call, what: str) -> ConfigError:
  name = f"{workflow}/{call.name}"
  return ConfigError(f"config.agents.calls: call {name!r} {what}")
