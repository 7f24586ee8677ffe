"""The confidence threshold that follows the target's recent state."""

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

FAST, SLOW = 1 / 8, 1 / 128  # weights of a round in recent and long-run means
ENTROPY_GAIN = 1.0  # logits per nat above the long-run mean
ACCEPTANCE_GAIN = 2.0  # logits per unit below the long-run mean
FLOOR, CEILING = 0.02, 0.98
PATIENCE = 3  # rounds of width 0 in a row before the first burst


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trend:
  """A quantity's recent and long-run means.

  Attributes:
    fast, slow: f32[]. count: i32[], values seen; both are plain averages until
      they are as long as their memory, so that neither starts out ahead.
  """

  fast: jax.Array
  slow: jax.Array
  count: jax.Array

  @classmethod
  def create(cls) -> "Trend":
    return cls(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))

  def add(self, values: jax.Array, valid: jax.Array) -> "Trend":
    """Takes in the mean of the valid entries; if none is, `fade`."""
    total = valid.sum()
    value = jnp.where(valid, values, 0.0).sum() / jnp.maximum(total, 1)
    share = 1 / (self.count + 1)
    seen = Trend(
      self.fast + jnp.maximum(share, FAST) * (value - self.fast),
      self.slow + jnp.maximum(share, SLOW) * (value - self.slow),
      self.count + 1,
    )
    return select(total > 0, seen, self.fade())

  def fade(self) -> "Trend":
    """With nothing new, what is recent grows old: width 0 tests no draft."""
    fast = self.fast + FAST * (self.slow - self.fast)
    return dataclasses.replace(self, fast=fast)

  @property
  def gap(self) -> jax.Array:
    """f32[], recent less long-run."""
    return self.fast - self.slow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ThresholdState:
  """What past rounds say of the target, and whether the drafter rests.

  Attributes:
    entropy: of the target, nats. acceptance: accepted over tested nodes.
    zeros: i32[], rounds of width 0 in a row.
    pause: i32[], bursts from one probe to the next. left: i32[], of them.
  """

  entropy: Trend
  acceptance: Trend
  zeros: jax.Array
  pause: jax.Array
  left: jax.Array


@dataclasses.dataclass(frozen=True)
class Threshold(Policy):
  """The leading nodes whose chance to be reached and right is at least theta.

  The drafter's own confidence is taken for the chance. Where the target is
  less certain than it used to be and accepts less, theta is raised, and lowered
  in the opposite case: the same confidence is worth less there.
  """

  theta: float
  needs_entropy: ClassVar[bool] = True

  def init_state(self, num_depths: int) -> ThresholdState:
    del num_depths
    zero = jnp.zeros((), jnp.int32)
    return ThresholdState(Trend.create(), Trend.create(), zero, zero, zero)

  def effective(self, state: ThresholdState) -> jax.Array:
    """f32[], theta as the target's recent state shifts it."""
    shift = ENTROPY_GAIN * state.entropy.gap
    shift -= ACCEPTANCE_GAIN * state.acceptance.gap
    logit = jax.scipy.special.logit(self.theta)
    return jnp.clip(jax.nn.sigmoid(logit + shift), FLOOR, CEILING)

  def should_draft(self, state: ThresholdState, costs: Costs) -> jax.Array:
    del costs
    return state.left <= 0

  def choose(
    self,
    state: ThresholdState,
    confidence: jax.Array,
    margins: jax.Array,
    nodes: Tree,
    active: jax.Array,
    costs: Costs,
  ) -> jax.Array:
    del margins, costs
    likely = path_products(nodes, confidence) >= self.effective(state)
    counts = jnp.cumprod(likely.astype(jnp.int32), axis=1).sum(axis=1)
    widest = jnp.where(active, counts, 0).max()
    widths = jnp.array(self.widths(confidence.shape[1]), jnp.int32)
    return (widths < widest).sum().astype(jnp.int32)

  def observe(
    self, state: ThresholdState, outcome: Outcome, costs: Costs
  ) -> ThresholdState:
    del costs
    tested = outcome.tested & outcome.active[:, None]
    zeros = jnp.where(outcome.index == 0, state.zeros + 1, 0)
    pause = jnp.where(zeros >= PATIENCE, longer(state.pause), 0)
    return ThresholdState(
      entropy=state.entropy.add(outcome.entropy, outcome.active),
      acceptance=state.acceptance.add(outcome.accepted * 1.0, tested),
      zeros=zeros,
      pause=pause,
      left=pause,
    )

  def rest(self, state: ThresholdState) -> ThresholdState:
    return dataclasses.replace(
      state,
      entropy=state.entropy.fade(),
      acceptance=state.acceptance.fade(),
      left=state.left - 1,
    )
