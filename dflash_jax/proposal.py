"""What a drafter offers the target in one round, and how it was drawn."""

import dataclasses

import jax
import jax.numpy as jnp

from dflash_jax import noise, tree
from dflash_jax.noise import Stream
from dflash_jax.sampling import GREEDY, Sampling, argmax, weigh
from dflash_jax.tree import Tree
from pallas_kernels.lm_head_verify import RowStats


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Law:
  """The distribution drafts were drawn from, one per depth.

  Attributes:
    probs: f32[B, D, V'], each row sums to 1.
    ids: i32[V'], token id of each column, or None when columns are ids.
    ranked: i32[B, D, k], the columns drawn at each depth, in the order of
      drawing without replacement.
  """

  probs: jax.Array
  ids: jax.Array | None
  ranked: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
  """P drafted nodes that continue the anchor.

  Attributes:
    tokens: i32[B, P]; in a chain, tokens[:, i] is the draft i + 1 positions
      past the anchor. P = 0 proposes nothing: the round is plain decoding.
    confidence: f32[B, P], the drafter's probability of each node's token, given
      its parent. Of sampled drafts, the largest probability at that depth: what
      is known before the draw, so that no width chosen by it can depend on the
      draw (non-anticipation, DSpark, arXiv 2607.05147 appendix A).
    margins: f32[B, P], in the same spirit: the node's logit less the best
      other one; of sampled drafts, the two largest logits' distance.
    tree: of the nodes; None for a chain.
    law: what sampled drafts were drawn from; None for certain drafts, which the
      drafter's state decides alone (or with the noise that the target's own
      choice shares).
  """

  tokens: jax.Array
  confidence: jax.Array
  margins: jax.Array
  tree: Tree | None = None
  law: Law | None = None

  @property
  def num_nodes(self) -> int:
    """P."""
    return self.tokens.shape[1]

  def prefix(self, count: int) -> "Proposal":
    """The first `count` nodes, which are a chain or a tree themselves."""
    return dataclasses.replace(
      self,
      tokens=self.tokens[:, :count],
      confidence=self.confidence[:, :count],
      margins=self.margins[:, :count],
      tree=self.tree and self.tree.prefix(count),
    )


def chain(tokens: jax.Array) -> Proposal:
  """tokens i32[B, P] as certain drafts of a drafter that states no doubt."""
  ones = jnp.ones(tokens.shape, jnp.float32)
  return Proposal(tokens=tokens, confidence=ones, margins=ones)


@dataclasses.dataclass(frozen=True)
class Drafting:
  """What a drafter is asked for; static in jitted code.

  Attributes:
    num_nodes: P.
    is_tree: a tree of P nodes; else a chain.
    sampling: greedy drafts are certain; others are drawn.
    is_coupled: drafts are drawn with the noise of the target's own choice
      (Daliri et al., arXiv 2408.07978), which makes them certain again: what
      is drafted is where the target would fall if it shared the drafter's law.
  """

  num_nodes: int
  is_tree: bool = False
  sampling: Sampling = GREEDY
  is_coupled: bool = False

  @property
  def is_certain(self) -> bool:
    """Whether proposals come without a law."""
    return self.sampling.is_greedy or self.is_coupled

  @property
  def takes_best(self) -> bool:
    """Whether a chain of each depth's likeliest token is asked for."""
    return self.sampling.is_greedy and not self.is_tree and self.num_nodes > 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moment:
  """Where each row stands: the addresses of its noise.

  Attributes:
    seeds: u32[B], one per request.
    positions: i32[B], of the anchor: no two rounds of a request share it.
  """

  seeds: jax.Array
  positions: jax.Array


def from_best(stats: RowStats, ids: jax.Array | None) -> Proposal:
  """The chain of each depth's likeliest token.

  Args:
    stats: of the drafter's head, rows [B, P].
    ids: i32[V'], token id of each column, or None.
  """
  return Proposal(
    tokens=stats.best if ids is None else ids[stats.best],
    confidence=jnp.exp(stats.top - stats.logsumexp),
    margins=stats.margin,
  )


def from_marginals(
  logits: jax.Array,
  ids: jax.Array | None,
  drafting: Drafting,
  moment: Moment,
  vocab: int,
  above: int = 0,
) -> Proposal:
  """Drafts of a drafter whose depths are independent, as DFlash's are.

  Args:
    logits: f32[B, D, V'], of depths above + 1..above + D; a chain uses the
      first P.
    ids: i32[V'], token id of each column, or None.
    drafting: what to draw.
    moment: addresses of noise.
    vocab: V, the target's.
    above: depths drafted before these.
  """
  if not drafting.is_tree:
    logits = logits[:, : drafting.num_nodes]
  depths = 1 + above + jnp.arange(logits.shape[1], dtype=jnp.int32)
  if drafting.is_certain:
    best = score(logits, ids, drafting, moment, vocab, depths)
    law = None
  else:
    probs = weigh(logits, drafting.sampling)
    probs = probs / probs.sum(axis=-1, keepdims=True)
    best = jnp.log(probs)
    law = Law(
      probs=probs,
      ids=ids,
      ranked=_draw(
        probs, moment, depths, drafting.num_nodes if drafting.is_tree else 1
      ),
    )
  if drafting.is_tree:
    return _plant(best, ids, drafting, law)
  columns = argmax(best) if law is None else law.ranked[..., 0]
  confidence, margins = _doubt(best)
  return Proposal(
    tokens=columns if ids is None else ids[columns],
    confidence=confidence,
    margins=margins,
    law=law,
  )


def score(
  logits: jax.Array,
  ids: jax.Array | None,
  drafting: Drafting,
  moment: Moment,
  vocab: int,
  depths: jax.Array,
) -> jax.Array:
  """f32[B, N, V']: what certain drafts are ranked by.

  Greedy ones by their logits; coupled ones by the log of the draft law in the
  race that the target runs.

  Args:
    logits: f32[B, N, V'].
    ids, drafting, moment, vocab: as in `from_marginals`.
    depths: i32[N], or i32[1] of all rows, from 1.
  """
  if drafting.sampling.is_greedy:
    return logits
  times = noise.race_times(
    Stream.CHOICE,
    moment.seeds[:, None],
    moment.positions[:, None] + depths,
    vocab,
  )
  times = times if ids is None else times[..., ids]
  return jnp.log(weigh(logits, drafting.sampling) / times)


def _draw(
  probs: jax.Array, moment: Moment, depths: jax.Array, count: int
) -> jax.Array:
  """i32[B, D, count]: columns drawn without replacement, first drawn first.

  The order of arrival in an exponential race is successive sampling.
  """
  times = noise.race_times(
    noise.at_depth(Stream.DRAFT, depths),
    moment.seeds[:, None],
    jnp.broadcast_to(moment.positions[:, None], probs.shape[:2]),
    probs.shape[-1],
  )
  speed = probs / times
  if count == 1:
    return argmax(speed)[..., None]
  return jax.lax.top_k(speed, min(count, probs.shape[-1]))[1]


def _doubt(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Of the best column of f32[B, D, V']: probability, lead over the second."""
  best = argmax(scores)[..., None]
  top = jnp.take_along_axis(scores, best, axis=-1)[..., 0]
  columns = jnp.arange(scores.shape[-1])
  second = jnp.where(columns == best, -jnp.inf, scores).max(axis=-1)
  total = jax.nn.logsumexp(scores, axis=-1)
  return jnp.exp(top - total), top - second


def _plant(
  scores: jax.Array,
  ids: jax.Array | None,
  drafting: Drafting,
  law: Law | None,
) -> Proposal:
  """A best-first tree over the ranks of scores f32[B, D, V'].

  Its shape follows the sorted scores alone. Certain drafts label rank r with
  the r-th best column; sampled ones with the r-th drawn.
  """
  k = min(max(drafting.num_nodes, 2), scores.shape[-1])
  sorted_scores, ranked = jax.lax.top_k(scores, k)
  total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
  log_probs = sorted_scores - total
  shape, _ = tree.best_first(log_probs, drafting.num_nodes)
  lead = jnp.concatenate(
    [
      sorted_scores[..., :1] - sorted_scores[..., 1:2],
      sorted_scores[..., 1:] - sorted_scores[..., :1],
    ],
    axis=-1,
  )
  columns = tree.look_up(shape, ranked if law is None else law.ranked)
  return Proposal(
    tokens=columns if ids is None else ids[columns],
    confidence=tree.look_up(shape, jnp.exp(log_probs)),
    margins=tree.look_up(shape, lead),
    tree=shape,
    law=law,
  )
