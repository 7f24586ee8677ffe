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

from pallas_kernels import noise

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
    temperature: > 0, of the target's logits; None if probabilities are given.
    draft_temperature: likewise of the drafter's, that drafts were drawn at.
    streams: of the draws.
  """

  name: str
  temperature: float | None
  draft_temperature: float | None
  streams: Streams


class Softmax(NamedTuple):
  """What turns a row of logits into probabilities.

  Attributes:
    top: f32, the largest logit.
    share: f32, the probability of the token that has it.
  """

  top: jax.Array
  share: jax.Array

  @classmethod
  def of_probabilities(cls, rows: jax.Array) -> "Softmax":
    """Of rows f32[..., V] that need none."""
    return cls(jnp.zeros(rows.shape[:-1]), jnp.ones(rows.shape[:-1]))

  def at(self, values: jax.Array, temperature: float | None) -> jax.Array:
    """Probabilities of some logits, or of probabilities."""
    if temperature is None:
      return values * self.share
    scaled = (values - self.top) * np.float32(1 / temperature)
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
  target: jax.Array,
  draft: jax.Array,
  drafts: jax.Array,
  seeds: jax.Array,
  moments: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """accepted i32[B] and last i32[B], of arguments as in the operation."""
  softmaxes = passes.measure()
  odds, scales = weigh(rule, passes, softmaxes, target, draft, drafts)
  draws = noise.uniform(rule.streams.accept, seeds, moments, drafts.shape[1])
  count = count_leading if rule.name == "token" else find_last
  accepted = count(draws <= odds)
  scale = _pick_row(scales, accepted)
  return accepted, passes.race(end(rule, accepted, scale, *softmaxes))


def weigh(
  rule: Rule,
  passes: Passes,
  softmaxes: tuple[Softmax, Softmax],
  target: jax.Array,
  draft: jax.Array,
  drafts: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Odds f32[B, P] of the drafts; the scale f32[B, P + 1] of each ending."""
  P = drafts.shape[1]
  # From all rows: a slice of the logits would be a copy of them.
  p = softmaxes[0].at(
    _pick(target, jnp.pad(drafts, ((0, 0), (0, 1)))), rule.temperature
  )
  q = softmaxes[1].at(_pick(draft, drafts), rule.draft_temperature)
  ratios = p[:, :P] / q
  if rule.name == "token":
    return jnp.minimum(ratios, 1.0), jnp.ones_like(p)
  weights = block_weights(ratios)
  inner = weights[:, :-1]
  if P > 1:
    inner = block_odds(passes.excess(inner, *softmaxes), inner)
  odds = jnp.concatenate([inner, weights[:, -1:]], axis=1)
  return odds, jnp.pad(weights, ((0, 0), (1, 0)), constant_values=1.0)


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


def end(
  rule: Rule,
  accepted: jax.Array,
  scale: jax.Array,
  target: Softmax,
  draft: Softmax,
) -> Ending:
  """The ending of rounds that accept i32[B] drafts, their law scaled f32[B]."""
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


def _pick(rows: jax.Array, tokens: jax.Array) -> jax.Array:
  """rows f32[B, T, V] at tokens i32[B, T]."""
  return jnp.take_along_axis(rows, tokens[..., None], axis=-1)[..., 0]


def _pick_row(values: jax.Array, rows: jax.Array) -> jax.Array:
  """values f32[B, T] at rows i32[B]."""
  return jnp.take_along_axis(values, rows[:, None], axis=1)[:, 0]


def count_leading(kept: jax.Array) -> jax.Array:
  """kept bool[B, P] -> i32[B], the number before the first not kept."""
  return jnp.cumprod(kept.astype(jnp.int32), axis=1).sum(axis=1)


def find_last(kept: jax.Array) -> jax.Array:
  """kept bool[B, P] -> i32[B], place of the last kept, from 1; else 0."""
  places = jnp.arange(1, kept.shape[1] + 1, dtype=jnp.int32)
  return jnp.where(kept, places, 0).max(axis=1)
