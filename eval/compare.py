r"""What differs between two evaluations, and how sure that is.

    python -m eval.compare A B

A and B are records of eval.main or eval.suite, or directories of them. Says in
which settings they differ and, for each prompt set and temperature that both
have, by how much B's accepted length, acceptance and speed differ from A's,
with 95% intervals: paired where the prompts are the same. Two files are
compared whatever their drafters; of directories, drafters of equal names are.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dflash_jax import command
from dflash_jax.config import Config, ConfigError
from eval import bootstrap, replies, runs
from eval.bootstrap import Interval
from eval.differences import Change, compare_settings
from eval.replies import Replies
from eval.runs import Run
from eval.tables import align

# Settings that change what the numbers mean, not just what they are.
_INCOMPARABLE = (
  "config.target.path",
  "config.target.random",
  "config.target.seed",
  "config.target.dtype",
  "config.eval.max_new_tokens",
  "config.decode.temperature",
)
FEW = 10  # prompts, below which a bootstrap's percentiles are a guess
_MACHINE = ("machine.cpu", "machine.device", "machine.cores")


@dataclasses.dataclass(frozen=True)
class Difference:
  """A number of B against the same of A.

  Attributes:
    name: of the number.
    here, there: A's and B's.
    interval: of B - A or, if is_ratio, of B / A; None where there is nothing
      to draw.
    is_ratio: whether they are compared by their ratio.
  """

  name: str
  here: float
  there: float
  interval: Interval | None
  is_ratio: bool

  @property
  def is_clear(self) -> bool:
    """Whether the interval tells it from no difference."""
    nothing = 1.0 if self.is_ratio else 0.0
    return self.interval is not None and self.interval.excludes(nothing)


def main(config: Config, *paths: str) -> None:
  """Entry point of python -m eval.compare."""
  del config
  if len(paths) != 2:
    raise ConfigError(
      f"{len(paths)} records are named; eval.compare takes two, A and B: files "
      "or directories of eval.main or eval.suite"
    )
  here, there = (runs.read([path])[0] for path in paths)
  pairs = match(here, there)
  if not pairs:
    raise ConfigError(
      f"{paths[0]} and {paths[1]} have no prompt set, drafter and temperature "
      "in common; name two files to compare whatever they hold"
    )
  print("\n\n".join(describe(a, b) for a, b in pairs))
  alone = [
    f"only in {path}: {', '.join(map(_name, rest))}"
    for path, mine, place in ((paths[0], here, 0), (paths[1], there, 1))
    if (rest := [r for r in mine if all(r is not p[place] for p in pairs)])
  ]
  if alone:
    print("\n" + "\n".join(alone))


def match(here: Sequence[Run], there: Sequence[Run]) -> list[tuple[Run, Run]]:
  """Runs to compare: two single ones, or those that share a key."""
  if len(here) == len(there) == 1:
    return [(here[0], there[0])]
  theirs = {run.key: run for run in there}
  return [(run, theirs[run.key]) for run in here if run.key in theirs]


def describe(here: Run, there: Run) -> str:
  """A table of numbers, how they were drawn, and the settings that differ."""
  changes = compare_settings(here.record, there.record)
  pair = pair_up(here, there)
  rows = [["", "A", "B", "B against A", "95% interval", ""]]
  rows += [_to_row(each) for each in compare(here, there, pair)]
  title = f"A: {_name(here)}\nB: {_name(there)}"
  warnings = [f"NOT COMPARABLE: {each}" for each in find_obstacles(changes)]
  if here.record.get("conventions") != there.record.get("conventions"):
    warnings.append('CONVENTIONS DIFFER: see both records\' "conventions"')
  parts = [
    title,
    *warnings,
    "\n".join(line.rstrip() for line in align(rows)),
    _say_drawn(here, there, pair),
    _say_apart(here, there, changes),
    _say_changes(changes),
  ]
  return "\n".join(part for part in parts if part)


def find_obstacles(changes: Sequence[Change]) -> list[str]:
  """Changes after which a difference is no longer one of drafters."""
  return [
    str(change) for change in changes if change.name.startswith(_INCOMPARABLE)
  ]


# --- Numbers ------------------------------------------------------------------


def pair_up(here: Run, there: Run) -> tuple[Replies, Replies] | None:
  """Replies to the same turns of the same prompts, in one order.

  None if the prompts are not the same, or a record does not have them.
  """
  digests = [
    (run.record.get("prompt_set") or {}).get("digest") for run in (here, there)
  ]
  ours, theirs = here.replies, there.replies
  if ours is None or theirs is None or not digests[0]:
    return None
  if digests[0] != digests[1] or len(ours.prompt) != len(theirs.prompt):
    return None
  pair = ours.take(_order(ours)), theirs.take(_order(theirs))
  same = np.array_equal(pair[0].prompt, pair[1].prompt) and np.array_equal(
    pair[0].turn, pair[1].turn
  )
  return pair if same else None


def _order(found: Replies) -> np.ndarray:
  return np.lexsort((found.turn, found.prompt))


def compare(
  here: Run, there: Run, pair: tuple[Replies, Replies] | None
) -> list[Difference]:
  """The main numbers; see `Difference`.

  Args:
    here, there: A and B.
    pair: of `pair_up`: both are drawn together. Without, each is drawn by
      itself, if the records have replies.
  """
  ours, theirs = pair or (here.replies, there.replies)
  found = []
  for name, is_ratio in (
    ("tau_per_request", False),
    ("tau_per_round", False),
    ("first_acceptance", False),
    ("speculative_tokens_per_s", True),
    ("plain_tokens_per_s", True),
    ("speedup", True),
  ):
    interval = None
    if ours is not None and theirs is not None:
      interval = _interval(name, ours, theirs, is_ratio, pair is not None)
    a, b = (_value(run, name) for run in (here, there))
    found.append(Difference(name, a, b, interval, is_ratio))
  return found


def _value(run: Run, name: str) -> float:
  if name == "first_acceptance":
    shares = run.record["acceptance_per_position"]
    return shares[0] if shares else 0.0
  return run.record[name]


def _interval(
  name: str, ours: Replies, theirs: Replies, is_ratio: bool, paired: bool
) -> Interval | None:
  if min(ours.prompts, theirs.prompts) < 2:
    return None
  once = [bootstrap.once(len(each.prompt)) for each in (ours, theirs)]
  drawn = [
    bootstrap.draw(ours.prompt, seed=0),
    bootstrap.draw(theirs.prompt, seed=0 if paired else 1),
  ]
  value, draws = (
    _change(_number(name, ours, a), _number(name, theirs, b), is_ratio)
    for a, b in (once, drawn)
  )
  low, high = bootstrap.bounds(draws)
  if np.isnan(low) or np.isnan(value[0]):
    return None
  return Interval(float(value[0]), float(low), float(high))


def _number(name: str, found: Replies, weights: np.ndarray) -> np.ndarray:
  if name != "first_acceptance":
    return replies.NUMBERS[name](found, weights)
  return replies.acceptance_per_position(found, weights)[:, 0]


def _change(a: np.ndarray, b: np.ndarray, is_ratio: bool) -> np.ndarray:
  return b / a if is_ratio else b - a


# --- Text ---------------------------------------------------------------------

_TITLES = {
  "tau_per_request": "tau per reply",
  "tau_per_round": "tau per round",
  "first_acceptance": "first draft accepted",
  "speculative_tokens_per_s": "tokens/s",
  "plain_tokens_per_s": "plain tokens/s",
  "speedup": "speed-up",
}


def _to_row(found: Difference) -> list[str]:
  form = "{:.3f}x" if found.is_ratio else "{:+.3f}"
  shown = ["-", "-"]
  if found.interval:
    each = found.interval
    shown = [
      form.format(each.value),
      f"{form.format(each.low)} to {form.format(each.high)}",
    ]
  return [
    _TITLES[found.name],
    f"{found.here:.3f}",
    f"{found.there:.3f}",
    *shown,
    "*" if found.is_clear else "",
  ]


def _say_drawn(
  here: Run, there: Run, pair: tuple[Replies, Replies] | None
) -> str:
  if pair:
    count = pair[0].prompts
    few = " SO FEW make intervals too narrow." if count < FEW else ""
    return (
      f"Paired over the same {count} prompts.{few} *: the interval excludes no "
      "difference."
    )
  if here.replies is None or there.replies is None:
    return "No intervals: a record has no replies; measure it anew."
  return (
    "UNPAIRED: the prompts are not the same, so a part of any difference is "
    "theirs. *: the interval excludes no difference."
  )


def _say_apart(here: Run, there: Run, changes: Sequence[Change]) -> str:
  """What comparing speeds is worth."""
  ours, theirs = (run.record.get("interleaved") for run in (here, there))
  if ours and ours == theirs:
    return "Decoded in turns, in one process."
  machines = [each for each in changes if each.name in _MACHINE]
  where = "on other machines" if machines else "at other times"
  return (
    f"Decoded {where}: tokens/s differ by that too, which no interval here "
    "covers; each speed-up is against plain decoding beside it."
  )


def _say_changes(changes: Sequence[Change]) -> str:
  if not changes:
    return "No setting differs."
  lines = [
    f"  {each.name}: {_show(each.here)} -> {_show(each.there)}"
    for each in changes
  ]
  return "Settings that differ, A -> B:\n" + "\n".join(lines)


def _show(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def _name(run: Run) -> str:
  return f"{run.prompts}, {run.drafter}, temperature {run.temperature:g}"


if __name__ == "__main__":
  command.run(main, takes_operands=True)
