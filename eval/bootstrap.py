"""How sure a number is: intervals by drawing prompts anew.

Replies of one prompt are alike, so an interval draws prompts with replacement
and takes all replies of each, as often as it was drawn. Two runs over the same
prompts are drawn together (paired): what makes a prompt easy for both then
cancels out of their difference. Intervals are percentiles of the draws (Efron
1979, Annals of Statistics 7(1), 1-26), a little narrow where prompts are few.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

DRAWS = 4000
COVERAGE = 0.95


@dataclasses.dataclass(frozen=True)
class Interval:
  """An estimate and where it would fall in COVERAGE of all repetitions."""

  value: float
  low: float
  high: float

  def excludes(self, value: float) -> bool:
    """Whether the interval tells the estimate apart from this value."""
    return not self.low <= value <= self.high


def draw(
  prompts: Sequence[int] | np.ndarray, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
  """How often each reply is drawn, i64[draws, N].

  Args:
    prompts: i[N], of each reply; replies of a prompt are drawn together.
    draws: how many.
    seed: equal seeds and prompts give equal draws.
  """
  names, place = np.unique(np.asarray(prompts), return_inverse=True)
  count = len(names)
  rng = np.random.default_rng(seed)
  return rng.multinomial(count, np.full(count, 1 / count), draws)[:, place]


def once(replies: int) -> np.ndarray:
  """As `draw`, of what was measured: one draw that has every reply once."""
  return np.ones((1, replies), np.int64)


def ratio(
  above: np.ndarray, below: np.ndarray, weights: np.ndarray
) -> np.ndarray:
  """Sum / sum of replies, f64[draws, ...]; nan where there is nothing below.

  Args:
    above, below: f[N, ...], of each reply.
    weights: i[draws, N].
  """
  with np.errstate(invalid="ignore", divide="ignore"):
    return (weights @ above) / (weights @ below)


def median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """Median over replies, f64[draws]; nan where none was drawn.

  Args:
    values: f[N], of each reply.
    weights: i[draws, N].
  """
  if not values.size:
    return np.full(len(weights), np.nan)
  order = np.argsort(values, kind="stable")
  ranks = weights[:, order].cumsum(axis=1)
  total, last = ranks[:, -1:], len(values) - 1
  # Of an even number, the mean of the two in the middle.
  lower = (ranks <= (total - 1) // 2).sum(axis=1).clip(max=last)
  upper = (ranks <= total // 2).sum(axis=1).clip(max=last)
  found = (values[order][lower] + values[order][upper]) / 2
  return np.where(total[:, 0] > 0, found, np.nan)


def bounds(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where COVERAGE of the draws f[draws, ...] lie; draws of nan are left out.

  All nan gives nan.
  """
  tail = 50 * (1 - COVERAGE)
  known = ~np.isnan(draws).all(axis=0)
  filled = np.where(known, draws, 0.0)
  low, high = np.nanpercentile(filled, [tail, 100 - tail], axis=0)
  return np.where(known, low, np.nan), np.where(known, high, np.nan)


def pigeonhole(
  table: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> Interval:
  """The mean of table f[S, P], S seeds by P prompts, with its interval.

  Seeds and prompts are both drawn anew, whole rows and whole columns: the
  pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1(2), 386-411),
  a little wide rather than too narrow.
  """
  rng = np.random.default_rng(seed)
  seeds, prompts = table.shape
  rows = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
  columns = rng.multinomial(prompts, np.full(prompts, 1 / prompts), draws)
  means = np.einsum("ds,sp,dp->d", rows, table, columns, optimize=True)
  low, high = bounds(means / table.size)
  return Interval(float(table.mean()), float(low), float(high))
