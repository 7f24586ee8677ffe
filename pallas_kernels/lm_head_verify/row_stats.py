"""What verification needs to know of a row of logits, and how parts combine."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LOWEST = np.float32(-1e30)  # below every logit, yet finite: it can be scaled
NO_TOKEN = np.int32(2**31 - 1)  # loses every tie


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowStats:
  """Of each row of logits, after the soft cap.

  Attributes:
    best: i32[M], the likeliest token, the lowest id of a tie.
    top: f32[M], its logit.
    margin: f32[M], how far the runner-up lies below it.
    logsumexp: f32[M].
    given: f32[M], the logit of the token asked about; None unless tokens were
      given.
    sample: i32[M], a draw from softmax(logits / temperature); None unless draws
      were given.
  """

  best: jax.Array
  top: jax.Array
  margin: jax.Array
  logsumexp: jax.Array
  given: jax.Array | None
  sample: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Draws:
  """Where the noise of a row's draw comes from.

  Attributes:
    seeds: u32[A].
    moments: i32[A], positions of the tokens to be drawn.
    temperature: > 0.
    stream: what the draws are for.
    addresses: i32[M], which of the A addresses is a row's: many nodes of a tree
      share a position, whose noise then need only be made once. None where
      every row has its own, in order.
  """

  seeds: jax.Array
  moments: jax.Array
  temperature: float
  stream: int = 0
  addresses: jax.Array | None = None

  def spread(self) -> "Draws":
    """The same draws, with an address for each row."""
    if self.addresses is None:
      return self
    return dataclasses.replace(
      self,
      seeds=self.seeds[self.addresses],
      moments=self.moments[self.addresses],
      addresses=None,
    )


class Partial(NamedTuple):
  """Statistics of some of a row's logits; None for what is not asked."""

  top: jax.Array
  second: jax.Array
  total: jax.Array
  best: jax.Array
  given: jax.Array | None = None
  race: jax.Array | None = None
  winner: jax.Array | None = None


# Of no logits at all.
NOTHING: dict[str, Any] = dict(
  top=LOWEST,
  second=LOWEST,
  total=np.float32(0),
  best=NO_TOKEN,
  given=np.float32(0),
  race=LOWEST,
  winner=NO_TOKEN,
)


def fold(
  part: Partial,
  logits: jax.Array,
  ids: jax.Array,
  tokens: jax.Array | None,
  scores: jax.Array | None,
  *,
  vocab_axis: int,
) -> Partial:
  """Adds a tile of logits, in a kernel's registers.

  Args:
    part: of the tiles before, whose ids are lower.
    logits: f32, tokens of the vocabulary along vocab_axis; LOWEST where there
      is none.
    ids: i32, the token of each element.
    tokens: i32, one per row: whose logit is asked for; or None.
    scores: f32, logit / temperature - log(race time), or None.
    vocab_axis: 0 or 1.
  """

  def spread(row: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(row, logits.shape, (1 - vocab_axis,))

  def first_at(values: jax.Array, top: jax.Array) -> jax.Array:
    return jnp.min(
      jnp.where(values == spread(top), ids, NO_TOKEN), axis=vocab_axis
    )

  tile_top = jnp.max(logits, axis=vocab_axis)
  tile_best = first_at(logits, tile_top)
  others = jnp.where(ids == spread(tile_best), LOWEST, logits)
  tile_second = jnp.max(others, axis=vocab_axis)
  top = jnp.maximum(part.top, tile_top)
  runner_up = jnp.minimum(part.top, tile_top)
  weights = jnp.exp(logits - spread(top))
  given, race, winner = part.given, part.race, part.winner
  if tokens is not None:
    assert given is not None
    asked = jnp.where(ids == spread(tokens), logits, np.float32(0))
    given = given + jnp.sum(asked, axis=vocab_axis)
  if scores is not None:
    assert race is not None and winner is not None
    tile_race = jnp.max(scores, axis=vocab_axis)
    tile_winner = first_at(scores, tile_race)
    winner = jnp.where(tile_race > race, tile_winner, winner)
    race = jnp.maximum(race, tile_race)
  return Partial(
    top=top,
    second=jnp.maximum(runner_up, jnp.maximum(part.second, tile_second)),
    total=part.total * jnp.exp(part.top - top)
    + jnp.sum(weights, axis=vocab_axis),
    best=jnp.where(tile_top > part.top, tile_best, part.best),
    given=given,
    race=race,
    winner=winner,
  )


def merge(parts: Partial) -> RowStats:
  """Parts [C, M] of disjoint tokens, whatever their order -> the whole.

  One reduction, which is one launch on a GPU.
  """
  found = {name for name in NOTHING if getattr(parts, name) is not None}
  nothing = Partial(**{name: NOTHING[name] for name in found})
  whole = lax.reduce(parts, nothing, _combine, (0,))
  return RowStats(
    best=whole.best,
    top=whole.top,
    margin=whole.top - whole.second,
    logsumexp=whole.top + jnp.log(whole.total),
    given=whole.given,
    sample=whole.winner,
  )


def _combine(left: Partial, right: Partial) -> Partial:
  top = jnp.maximum(left.top, right.top)
  runner_up = jnp.minimum(left.top, right.top)
  given, race, winner = left.given, left.race, left.winner
  if given is not None and right.given is not None:
    given = given + right.given
  if race is not None and right.race is not None:
    winner = _first(race, winner, right.race, right.winner)
    race = jnp.maximum(race, right.race)
  return Partial(
    top=top,
    second=jnp.maximum(runner_up, jnp.maximum(left.second, right.second)),
    total=left.total * jnp.exp(left.top - top)
    + right.total * jnp.exp(right.top - top),
    best=_first(left.top, left.best, right.top, right.best),
    given=given,
    race=race,
    winner=winner,
  )


def _first(top, token, other_top, other):
  """The token with the higher top, the lower one of a tie."""
  lower = jnp.minimum(token, other)
  higher = jnp.where(top > other_top, token, other)
  return jnp.where(top == other_top, lower, higher)
