"""How many nodes of a draft the target verifies, chosen anew every round.

A drafter pays for its whole block; only the verify width saves time. A policy
picks one of a few compiled widths on the device, or asks for a plain burst:
BURST target passes without the drafter, so that useless drafts cost nothing.

Any choice is lossless where each emitted token is the target's own: argmax
drafts, or noise shared with the target. For sampled drafts under the token or
block rule, whether position k is verified must not depend on the token sampled
at k or later (arXiv 2607.05147, appendix A). It does not: a policy sees no
token, only the shape of this round's draft distributions, and past rounds. One
drafter is excepted: where a sampled token bends the distributions after it (a
Markov head), a width that weighs all nodes leaks it. Goodput must not be used
there; Threshold may, on a chain: it reads no further than where it cuts.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.prediction import Prediction
from dflash_jax.proposal import Proposal
from dflash_jax.tree import Tree, chain
from dflash_jax.verify import Verdict

BURST = 8  # plain target passes per burst
# Bursts between probes, at most. A probe that takes 1.5 passes and emits 1.2
# tokens wastes 0.3 passes in 65: 0.5%.
MAX_PAUSE = 8

State = Any  # a pytree of the policy's own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Costs:
  """Measured times; data, so that a new measurement compiles nothing.

  Attributes:
    plain: f32[], seconds of a plain target pass.
    rounds: f32[W], seconds of a drafted round at each compiled width, drafting
      included.
  """

  plain: jax.Array | np.ndarray | np.float32
  rounds: jax.Array | np.ndarray


# Enough for a policy without `needs_costs`.
UNMEASURED = Costs(plain=np.float32(0.0), rounds=np.zeros((0,), np.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
  """What one drafted round showed.

  Attributes:
    index: i32[], which compiled width was verified.
    emitted: i32[B], tokens.
    active: bool[B], rows that were not done when the round began.
    tested: bool[B, P], nodes within the width whose parent was accepted.
    accepted: bool[B, P].
    depths: i32[B, P], 1..D.
    margins, confidence: f32[B, P], as `choose` saw them.
    entropy: f32[B], nats, of the target after the last emitted token; read
      only by a policy with `needs_entropy`.
  """

  index: jax.Array
  emitted: jax.Array
  active: jax.Array
  tested: jax.Array
  accepted: jax.Array
  depths: jax.Array
  margins: jax.Array
  confidence: jax.Array
  entropy: jax.Array

  @classmethod
  def create(
    cls,
    proposal: Proposal,
    width: int,
    verdict: Verdict,
    emitted: jax.Array,
    active: jax.Array,
    prediction: Prediction,
    policy: "Policy",
  ) -> "Outcome":
    """What a round showed of all P nodes, of which `width` were verified.

    Args:
      proposal, verdict: of the round.
      emitted, active: as in Outcome.
      prediction: the target's, of width + 1 rows.
      policy: says whether it wants to know the entropy.
    """
    B, P = proposal.tokens.shape
    tree = proposal.tree or chain(B, P)
    nodes = jnp.arange(P, dtype=jnp.int32)
    if verdict.path is None:
      tested = nodes <= verdict.accepted[:, None]
      kept = nodes < verdict.accepted[:, None]
      last = verdict.accepted
    else:
      reached = verdict.path[:, None]
      tested = (tree.parents[..., None] == reached).any(axis=-1)
      kept = (nodes[:, None] + 1 == reached).any(axis=-1)
      last = verdict.path[:, -1]
    entropy = jnp.zeros((B,), jnp.float32)
    if policy.needs_entropy:
      logits = prediction.logits()
      row = jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]
      entropy = jax.scipy.special.entr(jax.nn.softmax(row)).sum(axis=-1)
    return cls(
      index=jnp.int32(0),  # the caller's to say
      emitted=emitted,
      active=active,
      tested=tested & (nodes < width),
      accepted=kept,
      depths=tree.depths,
      margins=proposal.margins,
      confidence=proposal.confidence,
      entropy=entropy,
    )


@dataclasses.dataclass(frozen=True)
class Policy:
  """Static and hashable, with pure functions of its state; by default none.

  Attributes:
    needs_costs: reads `costs`; others may be passed anything.
    needs_entropy: reads `Outcome.entropy`.
    rests: may ask for a burst; otherwise no burst need be compiled.
    weighs_all: whether a node is verified may hang on nodes after it.
  """

  needs_costs: ClassVar[bool] = False
  needs_entropy: ClassVar[bool] = False
  rests: ClassVar[bool] = True
  weighs_all: ClassVar[bool] = False

  def widths(self, num_nodes: int) -> tuple[int, ...]:
    """The widths to compile, ascending, none above `num_nodes`.

    Each costs compile time: few, and dense where small.
    """
    if num_nodes <= 5:
      return tuple(range(num_nodes + 1))
    if num_nodes <= 8:
      return (0, 1, 2, 3, 5, num_nodes)
    powers = {2**j for j in range((num_nodes - 1).bit_length())}
    return tuple(sorted({0, *powers, num_nodes}))

  def init_state(self, num_depths: int) -> State:
    """Before any round, of drafts up to `num_depths` deep."""
    del num_depths
    return ()

  def should_draft(self, state: State, costs: Costs) -> jax.Array:
    """bool[]: a drafted round next, or else a plain burst."""
    del state, costs
    return jnp.array(True)

  def choose(
    self,
    state: State,
    confidence: jax.Array,
    margins: jax.Array,
    nodes: Tree,
    active: jax.Array,
    costs: Costs,
  ) -> jax.Array:
    """Picks the width of a drafted round, one for all rows.

    Args:
      state: after `should_draft`.
      confidence: f32[B, P], draft probability of the node's token; of sampled
        drafts, the largest probability.
      margins: f32[B, P], draft logit of the node's token less the best other
        token's; of sampled drafts, the best less the second best.
      nodes: a chain's or a tree's.
      active: bool[B]; other rows have no say.
      costs: of each width.

    Returns:
      i32[], index into `widths(P)`.
    """
    del state, confidence, margins, nodes, active, costs
    return jnp.zeros((), jnp.int32)

  def observe(self, state: State, outcome: Outcome, costs: Costs) -> State:
    """Learns from a drafted round."""
    del outcome, costs
    return state

  def rest(self, state: State) -> State:
    """Takes note of a plain burst."""
    return state

  def force(self, state: State, index: int) -> State:
    """The state that always takes one width, so that its cost can be measured.

    Args:
      state: of a policy with `needs_costs`.
      index: into `widths(P)`.
    """
    raise NotImplementedError(f"{type(self).__name__} needs no costs")


@dataclasses.dataclass(frozen=True)
class Fixed(Policy):
  """Always the first n nodes; all, by default or where there are fewer."""

  n: int | None = None
  rests: ClassVar[bool] = False

  def widths(self, num_nodes: int) -> tuple[int, ...]:
    return (num_nodes if self.n is None else min(self.n, num_nodes),)


def longer(pause: jax.Array) -> jax.Array:
  """i32[], twice the pause, at most MAX_PAUSE."""
  return jnp.clip(2 * pause, 1, MAX_PAUSE)


def select(condition: jax.Array, yes: State, no: State) -> State:
  """One of two pytrees."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
