"""How sure a difference between two arms is: means, spreads, intervals.

Two arms answer the same prompts with the same seeds, so they are compared reply
by reply. Replies of one prompt are alike, and so are those of one seed: an
interval must draw both anew, prompts and seeds: eval.bootstrap.pigeonhole. Of
one seed only, it is of the prompts alone.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from eval.bootstrap import Interval, pigeonhole
from train.ablation.results import Record


@dataclasses.dataclass(frozen=True)
class Spread:
  """Of one number over seeds.

  Attributes:
    mean: of them.
    deviation: standard, of the sample; None of a single seed.
    values: each seed's.
  """

  mean: float
  deviation: float | None
  values: tuple[float, ...]

  @classmethod
  def of(cls, values: Iterable[float]) -> "Spread":
    """Of at least one value."""
    found = tuple(values)
    several = len(found) > 1
    deviation = statistics.stdev(found) if several else None
    return cls(statistics.fmean(found), deviation, found)


@dataclasses.dataclass(frozen=True)
class Difference:
  """One arm against another, on the replies that both gave.

  Attributes:
    tau: mean difference in tokens per round.
    share: that, as a share of the other's mean tau.
    speed: geometric mean of the ratios of tokens per second.
    seeds, replies: how many of each.
  """

  tau: Interval
  share: float
  speed: Interval
  seeds: int
  replies: int


def compare(arm: Sequence[Record], base: Sequence[Record]) -> Difference | None:
  """Compares the replies of two arms; None if they share none.

  An arm that was not trained has replies without a seed, which stand for any.
  Replies of one token, which took no round, are left out.
  """
  ours, theirs = _by_seed(arm), _by_seed(base)
  named = sorted(seed for seed in ours | theirs if seed is not None)
  seeds: list[int | None] = [*named] or [None]
  pairs = [(_of_seed(ours, seed), _of_seed(theirs, seed)) for seed in seeds]
  pairs = [(a, b) for a, b in pairs if a and b]
  places = set.intersection(*({*a} & {*b} for a, b in pairs)) if pairs else ()
  if not places:
    return None
  order = sorted(places)
  taus, bases, speeds = (
    np.array([[value(a[p], b[p]) for p in order] for a, b in pairs])
    for value in (
      lambda a, b: a["tau"] - b["tau"],
      lambda a, b: b["tau"],
      lambda a, b: math.log(b["seconds"] / a["seconds"]),
    )
  )
  speed = pigeonhole(speeds)
  return Difference(
    tau=pigeonhole(taus),
    share=float(taus.mean() / bases.mean()),
    speed=Interval(*map(math.exp, dataclasses.astuple(speed))),
    seeds=len(pairs),
    replies=len(order),
  )


_Replies = dict[tuple[str, int], Record]


def _by_seed(replies: Sequence[Record]) -> dict[int | None, _Replies]:
  """Replies with a round, by seed, then by prompt."""
  found: dict[int | None, _Replies] = {}
  for reply in replies:
    if reply["rounds"]:
      key = reply["prompts"], reply["place"]
      found.setdefault(reply["seed"], {})[key] = reply
  return found


def _of_seed(found: dict[int | None, _Replies], seed: int | None) -> _Replies:
  return found.get(seed) or found.get(None) or {}
