"""Laws of the target by row: what each request of a batch asks for.

The same mathematics as sampling.py, whose settings are static; here they are
data, so that one program decodes requests of all kinds side by side.
"""

import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.sampling import (
  GREEDY,
  Sampling,
  argmax,
  choice_times,
  drop_outside,
  race_inside,
)

_BITS = 32  # of a float32


class Kind(enum.IntEnum):
  """What the most demanding row of a batch asks for; a program each.

  A batch of greedy rows makes no noise, and one without restrictions never
  makes logits on a device with a kernel for that.
  """

  GREEDY = 0
  DRAWN = 1
  RESTRICTED = 2

  @classmethod
  def of(cls, sampling: Sampling) -> "Kind":
    """Of one row."""
    if sampling.is_greedy:
      return cls.GREEDY
    return cls.RESTRICTED if sampling.is_restricted else cls.DRAWN


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Laws:
  """A Sampling per row.

  Attributes:
    temperature: f32[B]; 0 is greedy, whatever the rest says.
    top_k: i32[B], 0 for all. top_p: f32[B], 1 for all. min_p: f32[B].
    kind: static: of the most demanding row, or more.
  """

  temperature: jax.Array | np.ndarray
  top_k: jax.Array | np.ndarray
  top_p: jax.Array | np.ndarray
  min_p: jax.Array | np.ndarray
  kind: Kind = jax.tree.static()

  @classmethod
  def of(cls, rows: Sequence[Sampling]) -> "Laws":
    """The laws of rows, on the host."""
    laws = [GREEDY if row.is_greedy else row for row in rows]
    return cls(
      temperature=np.array([law.temperature for law in laws], np.float32),
      top_k=np.array([law.top_k for law in laws], np.int32),
      top_p=np.array([law.top_p for law in laws], np.float32),
      min_p=np.array([law.min_p for law in laws], np.float32),
      kind=max(map(Kind.of, laws), default=Kind.GREEDY),
    )

  @property
  def is_greedy(self) -> bool:
    """Whether every row's likeliest token is certain."""
    return self.kind == Kind.GREEDY

  @property
  def is_restricted(self) -> bool:
    """Whether some row keeps tokens out of a draw."""
    return self.kind == Kind.RESTRICTED

  @property
  def is_certain(self) -> jax.Array:
    """bool[B, 1]: the greedy rows, beside tokens i32[B, T]."""
    return jnp.asarray(self.temperature)[:, None] == 0

  @property
  def warmth(self) -> jax.Array:
    """f32[B, 1, 1]: what logits f32[B, T, V] are divided by."""
    warmth = jnp.where(self.is_certain, 1.0, self.temperature[:, None])
    return warmth[..., None]


def choose(
  logits: jax.Array,
  laws: Laws,
  seeds: jax.Array,
  positions: jax.Array,
  places: jax.Array | None = None,
) -> jax.Array:
  """The target's own token after each row; as sampling.choose.

  Args:
    logits: f32[B, T, V].
    laws: of the B rows.
    seeds, positions, places: as in sampling.choose.

  Returns:
    i32[B, T]; the lowest id wins a tie.
  """
  times = choice_times(logits.shape[-1], seeds, positions, places)
  drawn = jax.lax.platform_dependent(
    logits, times, laws, cpu=_win_in_nucleus, default=_win
  )
  return jnp.where(laws.is_certain, argmax(logits), drawn)


def weigh(logits: jax.Array, laws: Laws) -> jax.Array:
  """logits f32[B, T, V] -> f32[B, T, V], proportional to probability.

  As sampling.weigh, of rows that are not greedy.
  """
  weights = _weigh_best(logits, laws)
  share = jnp.asarray(laws.top_p)[:, None, None]
  needed = share * weights.sum(axis=-1, keepdims=True)
  nucleus = drop_outside(weights, needed, np.float32(0))
  weights = jnp.where(share < 1, nucleus, weights)
  return jnp.where(weights < laws.min_p[:, None, None], 0.0, weights)


def _weigh_best(logits: jax.Array, laws: Laws) -> jax.Array:
  """The weights of each row's top_k tokens."""
  top = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp((logits - top) / laws.warmth)
  V = logits.shape[-1]
  asks = (laws.top_k > 0) & (laws.top_k < V)
  count = jnp.where(asks, laws.top_k, V)[:, None, None]
  return jnp.where(_is_among(logits, count), weights, 0.0)


def _is_among(logits: jax.Array, count: jax.Array) -> jax.Array:
  """bool[B, T, V]: the count i32[B, 1, 1] largest, ties with the last included.

  By bisection over the bits of a float, turned into a whole number of the same
  order: 32 sums, where a count that is data would otherwise take a sort.
  """
  unsigned = jnp.where(logits == 0, 0.0, logits)  # -0 ties with 0
  bits = jax.lax.bitcast_convert_type(unsigned, jnp.int32)
  ranks = jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)

  def halve(_, bounds):
    low, high = bounds  # at least `count` lie at or above low; fewer above high
    middle = high - ((high - low).astype(jnp.uint32) >> 1).astype(jnp.int32)
    found = (ranks >= middle).sum(axis=-1, keepdims=True, dtype=jnp.int32)
    enough = found >= count
    return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

  shape = (*logits.shape[:-1], 1)
  least, most = np.iinfo(np.int32).min, np.iinfo(np.int32).max
  bounds = jnp.full(shape, least, jnp.int32), jnp.full(shape, most, jnp.int32)
  limit, _ = jax.lax.fori_loop(0, _BITS, halve, bounds)
  return ranks >= limit


def _win(logits: jax.Array, times: jax.Array, laws: Laws) -> jax.Array:
  """i32[B, T]: the winner of a race among the tokens that are kept."""
  return argmax(weigh(logits, laws) / times)


def _win_in_nucleus(
  logits: jax.Array, times: jax.Array, laws: Laws
) -> jax.Array:
  """The same, without a search for the nucleus."""
  weights = jax.lax.cond(
    (laws.top_k > 0).any(), _weigh_best, _weigh_all, logits, laws
  )
  share = jnp.asarray(laws.top_p)[:, None, None]
  needed = share * weights.sum(axis=-1, keepdims=True)
  needed = jnp.where(share < 1, needed, jnp.inf)
  slow = weights < laws.min_p[:, None, None]
  return race_inside(weights, jnp.where(slow, -1.0, weights / times), needed)


def _weigh_all(logits: jax.Array, laws: Laws) -> jax.Array:
  """The weights of all tokens."""
  top = logits.max(axis=-1, keepdims=True)
  return jnp.exp((logits - top) / laws.warmth)
