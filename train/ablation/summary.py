"""Every arm's numbers, by way to decode and file of prompts, over its seeds."""

import dataclasses
import statistics
from collections.abc import Sequence

from train.ablation.comparison import Spread
from train.ablation.results import Record, Results


@dataclasses.dataclass(frozen=True)
class Cell:
  """What one arm reached on some prompts, decoded in one way.

  The conventions are eval's: tau is a mean over replies, speeds are medians.

  Attributes:
    arm, point: which.
    prompts: a file's name, or "" for all of them.
    tau: tokens per round, bonus included.
    tokens_per_s, plain_tokens_per_s: after the first.
    speedup: of the ratios of both.
    round_ms: drafting, verification and commit of a round.
    identical: share of replies that are plain decoding's.
    replies: of each seed.
  """

  arm: str
  point: str
  prompts: str
  tau: Spread
  tokens_per_s: Spread
  plain_tokens_per_s: Spread
  speedup: Spread
  round_ms: Spread
  identical: float
  replies: int


def summarize(results: Results) -> list[Cell]:
  """A Cell for every arm, point and file of prompts that has replies."""
  found: dict[tuple[str, str, str], dict[int | None, list[Record]]] = {}
  for reply in results.of_kind("reply"):
    for prompts in ("", reply["prompts"]):
      key = reply["arm"], reply["point"], prompts
      by_seed = found.setdefault(key, {})
      by_seed.setdefault(reply["seed"], []).append(reply)
  return [
    _make_cell(*key, list(by_seed.values()))
    for key, by_seed in found.items()
    if all(any(r["rounds"] for r in replies) for replies in by_seed.values())
  ]


def _make_cell(
  arm: str, point: str, prompts: str, seeds: Sequence[list[Record]]
) -> Cell:
  """Of the replies of each seed; those of one token have no rate."""
  timed = [[r for r in replies if r["rounds"]] for replies in seeds]

  def over_seeds(measure) -> Spread:
    return Spread.of(measure(replies) for replies in timed)

  def median_of(value) -> Spread:
    return over_seeds(lambda replies: statistics.median(map(value, replies)))

  every = [reply for replies in seeds for reply in replies]
  return Cell(
    arm=arm,
    point=point,
    prompts=prompts,
    tau=over_seeds(lambda rs: statistics.fmean(r["tau"] for r in rs)),
    tokens_per_s=median_of(lambda r: 1 / r["seconds"]),
    plain_tokens_per_s=median_of(lambda r: 1 / r["plain_seconds"]),
    speedup=median_of(lambda r: r["plain_seconds"] / r["seconds"]),
    round_ms=median_of(lambda r: 1e3 * r["seconds"] * r["tau"]),
    identical=statistics.fmean(r["identical"] for r in every),
    replies=len(every) // len(seeds),
  )
