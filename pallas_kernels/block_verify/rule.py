"""The token and the block rule, on what three passes over the logits find.

p_i and q_i are the target's and the drafter's laws at depth i, x_i the draft.
P_0 = 1, P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i));
S_i = sum_y max(P_i p_{i+1}(y) - q_{i+1}(y), 0);
h_i = S_i / (S_i + 1 - P_i) for i < P, and h_P = P_P.
The block rule accepts up to the last i whose draw is at most h_i; the token
rule up to the first draft whose draw is above min(1, p_i(x_i) / q_i(x_i)).
Sources: Sun et al., arXiv 2403.10444, algorithm 2; Leviathan et al., arXiv
2211.17192.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.noise import threefry

RULES = ("token", "block")


@dataclasses.dataclass(frozen=True)
class Streams:
  """What the draws of a round are for: static words of their addresses."""

  accept: int
  recovery: int
  bonus: int


@dataclasses.dataclass(frozen=True)
class Rule:
  """Everything static about a verification.

  Attributes:
    name: one of RULES.
    temperature: of the target, > 0.
    draft_temperature: that the drafts were drawn at, > 0.
    streams: of the draws.
  """

  name: str
  temperature: float
  draft_temperature: float
  streams: Streams


class Softmax(NamedTuple):
  """What turns a row's logits into probabilities.

  Attributes:
    top: f32, the largest logit.
    share: f32, the probability of the token that has it.
  """

  top: jax.Array
  share: jax.Array

  def at(self, logits: jax.Array, temperature: float) -> jax.Array:
    """Probabilities of some logits."""
    scaled = (logits - self.top) * np.float32(1 / temperature)
    return jnp.exp(scaled) * self.share


class Ending(NamedTuple):
  """Where a round ends, and the law of its last token.

  The law is norm(max(scale p - q, 0)), or p if that is empty: rounding alone
  can reject a draft of a law that equals the target's.

  Attributes:
    accepted: i32[B], which is the target's row p too.
    draft_row: i32[B], of q.
    target: of p, f32[B] each.
    draft: of q; its share is 0 where nothing was rejected.
    scale: f32[B].
    streams: i32[B], of the race.
  """

  accepted: jax.Array
  draft_row: jax.Array
  target: Softmax
  draft: Softmax
  scale: jax.Array
  streams: jax.Array


class Passes(Protocol):
  """Reductions over the vocabulary, by plain XLA or by kernels."""

  def measure(self) -> tuple[Softmax, Softmax]:
    """Of all rows: the target's f32[B, P + 1], and the drafter's f32[B, P]."""

  def excess(
    self, weights: jax.Array, target: Softmax, draft: Softmax
  ) -> jax.Array:
    """S_1..S_{P-1} f32[B, P - 1] of P_1..P_{P-1}."""

  def race(self, ending: Ending) -> jax.Array:
    """i32[B], a draw of the last token."""


def verify(
  rule: Rule,
  passes: Passes,
  target_logits: jax.Array,
  draft_logits: jax.Array,
  drafts: jax.Array,
  seeds: jax.Array,
  moments: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """accepted i32[B] and last i32[B], of arguments as in the operation."""
  target, draft = passes.measure()
  P = drafts.shape[1]
  # From all rows: a slice of the logits would be a copy of them.
  p = target.at(
    _pick(target_logits, jnp.pad(drafts, ((0, 0), (0, 1)))), rule.temperature
  )
  q = draft.at(_pick(draft_logits, drafts), rule.draft_temperature)
  ratios = p[:, :P] / q
  stream = jnp.full_like(moments, rule.streams.accept)
  draws = uniform(stream, seeds, moments, P)
  if rule.name == "token":
    accepted = _count_leading(draws <= jnp.minimum(ratios, 1.0))
    scale = jnp.ones_like(ratios[:, 0])
  else:
    weights = block_weights(ratios)
    inner = weights[:, :-1]
    if P > 1:
      inner = block_odds(passes.excess(inner, target, draft), inner)
    odds = jnp.concatenate([inner, weights[:, -1:]], axis=1)
    accepted = _find_last(draws <= odds)
    weights = jnp.pad(weights, ((0, 0), (1, 0)), constant_values=1.0)
    scale = _pick_row(weights, accepted)
  return accepted, passes.race(_end(rule, accepted, scale, target, draft))


def block_weights(ratios: jax.Array) -> jax.Array:
  """P_1..P_P f32[B, P] of p_i(x_i) / q_i(x_i)."""

  def extend(weight, ratio):
    weight = jnp.minimum(weight * ratio, 1.0)
    return weight, weight

  one = jnp.ones_like(ratios[:, 0])
  return jax.lax.scan(extend, one, ratios.T, unroll=True)[1].T


def block_odds(excess: jax.Array, weights: jax.Array) -> jax.Array:
  """h_i of S_i and P_i, any shape."""
  total = excess + 1.0 - weights
  return jnp.where(total > 0, excess / jnp.where(total > 0, total, 1.0), 1.0)


def uniform(
  streams: jax.Array, seeds: jax.Array, moments: jax.Array, count: int
) -> jax.Array:
  """f32[B, count] in (0, 1], by address.

  Args:
    streams: i32[B], what the draws are for.
    seeds: u32[B].
    moments: i32[B].
    count: draws per row; a cipher block serves i and i + ceil(count / 2).
  """
  pairs = jnp.arange(-(-count // 2), dtype=jnp.uint32)

  def spread(word):
    shape = (seeds.shape[0], pairs.shape[0])
    return jnp.broadcast_to(word.astype(jnp.uint32), shape)

  halves = threefry(
    (spread(seeds[:, None]), spread(moments[:, None])),
    (spread(pairs), spread(streams[:, None])),
  )
  bits = jnp.concatenate(halves, axis=-1)[:, :count].astype(jnp.float32)
  return (bits + 0.5) * np.float32(2.0**-32)


def _end(rule, accepted, scale, target: Softmax, draft: Softmax) -> Ending:
  P = draft.top.shape[1]
  rejected = accepted < P
  draft_row = jnp.minimum(accepted, P - 1)
  at_end = Softmax(*(_pick_row(x, draft_row) for x in draft))
  return Ending(
    accepted=accepted,
    draft_row=draft_row,
    target=Softmax(*(_pick_row(x, accepted) for x in target)),
    draft=Softmax(at_end.top, jnp.where(rejected, at_end.share, 0.0)),
    scale=jnp.where(rejected, scale, 1.0),
    streams=jnp.where(rejected, rule.streams.recovery, rule.streams.bonus),
  )


def _pick(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """logits f[B, T, V] at tokens i32[B, T]."""
  return jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]


def _pick_row(values: jax.Array, rows: jax.Array) -> jax.Array:
  """values f32[B, T] at rows i32[B]."""
  return jnp.take_along_axis(values, rows[:, None], axis=1)[:, 0]


def _count_leading(kept: jax.Array) -> jax.Array:
  """kept bool[B, P] -> i32[B], the number before the first not kept."""
  return jnp.cumprod(kept.astype(jnp.int32), axis=1).sum(axis=1)


def _find_last(kept: jax.Array) -> jax.Array:
  """kept bool[B, P] -> i32[B], place of the last kept, from 1; else 0."""
  places = jnp.arange(1, kept.shape[1] + 1, dtype=jnp.int32)
  return jnp.where(kept, places, 0).max(axis=1)
