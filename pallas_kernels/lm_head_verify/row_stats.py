"""What verification needs to know of a row of logits, and how parts combine."""

import dataclasses
from typing import NamedTuple

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
    given: f32[M], the logit of the token asked about.
    sample: i32[M], a draw from softmax(logits / temperature); None unless draws
      were given.
  """

  best: jax.Array
  top: jax.Array
  margin: jax.Array
  logsumexp: jax.Array
  given: jax.Array
  sample: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Draws:
  """Where the noise of a row's draw comes from.

  Attributes:
    seeds: u32[M].
    moments: i32[M], positions of the tokens to be drawn.
    temperature: > 0.
    stream: what the draws are for.
  """

  seeds: jax.Array
  moments: jax.Array
  temperature: float
  stream: int = 0


class Partial(NamedTuple):
  """Statistics of some of a row's logits; `race` and `winner` with draws."""

  top: jax.Array
  second: jax.Array
  total: jax.Array
  best: jax.Array
  given: jax.Array
  race: jax.Array | None
  winner: jax.Array | None


def fold(
  part: Partial,
  logits: jax.Array,
  ids: jax.Array,
  tokens: jax.Array,
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
    tokens: i32, one per row: whose logit is asked for.
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
  asked = jnp.where(ids == spread(tokens), logits, np.float32(0))
  race, winner = part.race, part.winner
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
    given=part.given + jnp.sum(asked, axis=vocab_axis),
    race=race,
    winner=winner,
  )


def merge(parts: Partial) -> RowStats:
  """Parts [C, M] of disjoint tokens, whatever their order -> the whole."""
  top = parts.top.max(axis=0)
  holds_top = parts.top == top
  best = jnp.where(holds_top, parts.best, NO_TOKEN).min(axis=0)
  is_best = holds_top & (parts.best == best)
  second = jnp.where(is_best, parts.second, parts.top).max(axis=0)
  total = (parts.total * jnp.exp(parts.top - top)).sum(axis=0)
  sample = None
  if parts.race is not None and parts.winner is not None:
    wins = parts.race == parts.race.max(axis=0)
    sample = jnp.where(wins, parts.winner, NO_TOKEN).min(axis=0)
  return RowStats(
    best=best,
    top=top,
    margin=top - second,
    logsumexp=top + jnp.log(total),
    given=parts.given.sum(axis=0),
    sample=sample,
  )
