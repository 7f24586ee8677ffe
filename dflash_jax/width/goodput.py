"""The width with the most expected tokens per second, by measured costs."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dflash_jax.tree import Tree, path_products
from dflash_jax.width.base import (
  Costs,
  Outcome,
  Policy,
  longer,
  select,
)

MARGIN_LIMIT = 16.0  # logits; beyond it a margin says nothing more
# Before any evidence: w and b of a margin, and their standard deviations. A
# chance of 0.5 at no margin, 0.82 at 3: optimistic, so that drafts are tried.
PRIOR, PRIOR_SPREAD = (0.5, 0.0), (0.5, 1.5)
# What a round leaves of older evidence, and a probe: 100 rounds of memory, 5.
MEMORY, PROBE_MEMORY = 0.99, 0.8
ROUND_WEIGHT = 1 / 30  # least weight of a round in the realised rate
# Drafting that yields a little less than plain passes goes on: the estimate's
# noise would end good drafting more often than this slack keeps bad drafting.
SLACK = 0.98
FIRST_TOKENS = 2.0  # of a free round, at the start; 8 bad rounds use it up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fit:
  """Per depth, chance = sigmoid(w * margin + b), fitted to tested nodes.

  A normal belief about (w, b), as in a Kalman filter: one Newton step a round,
  in which old evidence fades into the prior, not just into doubt. A depth that
  is no longer tested turns optimistic again and so gets tested.

  Attributes:
    mean: f32[D, 2], w and b.
    precision: f32[D, 3], entries ww, wb and bb of the inverse covariance.
  """

  mean: jax.Array
  precision: jax.Array

  @classmethod
  def prior(cls, num_depths: int) -> "Fit":
    w, b = PRIOR_SPREAD
    return cls(
      jnp.tile(jnp.array(PRIOR), (num_depths, 1)),
      jnp.tile(jnp.array((w**-2, 0.0, b**-2)), (num_depths, 1)),
    )

  def chance(self, margins: jax.Array, depths: jax.Array) -> jax.Array:
    """f32[B, P]: a node's, given that its parent was accepted."""
    w, b = jnp.moveaxis(self.mean[depths - 1], -1, 0)
    return jax.nn.sigmoid(w * _bounded(margins) + b)

  def update(self, outcome: Outcome, memory: jax.Array) -> "Fit":
    """Takes in a round's tested nodes; f32[] memory is kept of the rest."""
    D = self.mean.shape[0]
    prior = Fit.prior(D)
    precision = memory * self.precision + (1 - memory) * prior.precision
    pull = memory * _times(self.precision, self.mean)
    pull += (1 - memory) * _times(prior.precision, prior.mean)
    faded = Fit(_solve(precision, pull), precision)
    m = _bounded(outcome.margins)
    p = faded.chance(m, outcome.depths)
    error, variance = outcome.accepted - p, p * (1 - p)
    terms = [error * m, error, m * m, m, jnp.ones_like(m)]
    terms += [variance * m * m, variance * m, variance]
    tested = outcome.tested & outcome.active[:, None]
    sums = jnp.einsum(
      "bpd,bpk->dk",
      jax.nn.one_hot(outcome.depths - 1, D) * tested[..., None],
      jnp.stack(terms, axis=-1),
      precision=jax.lax.Precision.HIGHEST,
    )
    # 1/4 bounds the variance from above: the step cannot overshoot, even when
    # a node that was thought certain is rejected.
    step = _solve(precision + sums[:, 2:5] / 4, sums[:, :2])
    return Fit(faded.mean + step, precision + sums[:, 5:])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GoodputState:
  """What past rounds say of drafts, and whether drafting is trusted.

  Attributes:
    fit: of acceptance.
    tokens, seconds: f32[], recent means of a drafted round, per active row.
    run: i32[], drafted rounds since the last burst.
    pause: i32[], bursts from one probe to the next; 0 while drafting is
      trusted. left: i32[], of them.
    forced: i32[], see Policy.force; -1 is free.
  """

  fit: Fit
  tokens: jax.Array
  seconds: jax.Array
  run: jax.Array
  pause: jax.Array
  left: jax.Array
  forced: jax.Array


@dataclasses.dataclass(frozen=True)
class Goodput(Policy):
  """The width with the most expected tokens per second.

  All widths are compared: costs are staircases (tiles), so goodput can fall
  and rise again. Where realised drafted rounds yield less per second than
  plain passes, bursts begin. A drafted round that does not pay doubles the
  pause before the next, which is a probe; one that pays halves it and is
  followed by another at once. So drafts that become good meet a probe within
  BURST * MAX_PAUSE = 64 tokens, and lucky probes of bad drafts cost a round or
  two. Simulated, from an acceptance of 0.05 to 0.9: the last burst ends 33
  tokens after the change on average, 78 at the 90th percentile.
  """

  needs_costs: ClassVar[bool] = True
  weighs_all: ClassVar[bool] = True

  def init_state(self, num_depths: int) -> GoodputState:
    zero = jnp.zeros((), jnp.int32)
    return GoodputState(
      fit=Fit.prior(num_depths),
      tokens=jnp.array(FIRST_TOKENS, jnp.float32),
      seconds=jnp.zeros((), jnp.float32),
      run=zero,
      pause=zero,
      left=zero,
      forced=zero - 1,
    )

  def force(self, state: GoodputState, index: int) -> GoodputState:
    return dataclasses.replace(state, forced=jnp.int32(index))

  def should_draft(self, state: GoodputState, costs: Costs) -> jax.Array:
    pays = state.tokens * costs.plain >= SLACK * state.seconds
    return pays | (state.left <= 0) | (state.forced >= 0)

  def choose(
    self,
    state: GoodputState,
    confidence: jax.Array,
    margins: jax.Array,
    nodes: Tree,
    active: jax.Array,
    costs: Costs,
  ) -> jax.Array:
    del confidence
    chance = state.fit.chance(margins, nodes.depths)
    rates = self.rates(chance, nodes, active, costs)
    # Evidence from bad drafts may say 0, which tests nothing. A probe takes at
    # least the narrowest width that would beat plain decoding with drafts as
    # good as the prior has them.
    chance = Fit.prior(state.fit.mean.shape[0]).chance(margins, nodes.depths)
    hopes = self.rates(chance, nodes, active, costs)
    enough = jnp.minimum(hopes.max(), active.sum() / costs.plain)
    least = jnp.where(state.pause > 0, jnp.argmax(hopes >= enough), 0)
    best = jnp.maximum(jnp.argmax(rates), least).astype(jnp.int32)
    return jnp.where(state.forced < 0, best, state.forced)

  def rates(
    self,
    chance: jax.Array,
    nodes: Tree,
    active: jax.Array,
    costs: Costs,
  ) -> jax.Array:
    """f32[W]: expected tokens per second of all active rows, by width."""
    survival = path_products(nodes, chance) * active[:, None]
    drafts = jnp.pad(jnp.cumsum(survival.sum(axis=0)), (1, 0))
    widths = jnp.array(self.widths(chance.shape[1]), jnp.int32)
    return (active.sum() + drafts[widths]) / costs.rounds

  def observe(
    self, state: GoodputState, outcome: Outcome, costs: Costs
  ) -> GoodputState:
    rows = outcome.active.sum()
    emitted = jnp.where(outcome.active, outcome.emitted, 0).sum() / rows
    # An average over the run, in which all earlier rounds count as one: a first
    # probe has half the say.
    weight = jnp.maximum(1 / (state.run + 2), ROUND_WEIGHT)
    tokens = state.tokens + weight * (emitted - state.tokens)
    seconds = costs.rounds[outcome.index] - state.seconds
    seconds = state.seconds + weight * seconds
    pays = tokens * costs.plain >= SLACK * seconds
    pause = jnp.where(pays, state.pause // 2, longer(state.pause))
    memory = jnp.where(state.pause > 0, PROBE_MEMORY, MEMORY)
    seen = GoodputState(
      fit=state.fit.update(outcome, memory),
      tokens=tokens,
      seconds=seconds,
      run=state.run + 1,
      pause=pause,
      left=jnp.where(pays, 0, pause),
      forced=state.forced,
    )
    return select(rows > 0, seen, state)  # all rows done: nothing was shown

  def rest(self, state: GoodputState) -> GoodputState:
    zero = jnp.zeros((), jnp.int32)
    return dataclasses.replace(state, run=zero, left=state.left - 1)


def _bounded(margins: jax.Array) -> jax.Array:
  return jnp.clip(margins, -MARGIN_LIMIT, MARGIN_LIMIT)


def _times(matrix: jax.Array, vector: jax.Array) -> jax.Array:
  """Symmetric matrix f32[D, 3] times vector f32[D, 2]."""
  a, b, c = jnp.moveaxis(matrix, -1, 0)
  x, y = jnp.moveaxis(vector, -1, 0)
  return jnp.stack([a * x + b * y, b * x + c * y], axis=-1)


def _solve(matrix: jax.Array, vector: jax.Array) -> jax.Array:
  """The f32[D, 2] that the symmetric matrix f32[D, 3] turns into vector."""
  a, b, c = jnp.moveaxis(matrix, -1, 0)
  inverse = jnp.stack([c, -b, a], axis=-1) / (a * c - b * b)[:, None]
  return _times(inverse, vector)
