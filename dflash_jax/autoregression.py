"""Drafts of a drafter that reads its own last token, one depth at a time.

A correction head over DFlash's slots, an EAGLE layer and a small language
model differ in what a step costs, not in how its logits become drafts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dflash_jax.proposal import (
  Drafting,
  Law,
  Moment,
  Proposal,
  chain,
  from_marginals,
  score,
)
from dflash_jax.tree import best_of

Carry = Any  # a pytree of the drafter's own, each leaf [B, ...]

# (carry, tokens i32[B, W], parents i32[B, W], depth) -> (carry, logits
# f32[B, W, V']): what follows each token. The tokens are at a static depth, of
# which the anchor's is 0; `parents` says which of the W tokens of the last
# step each one continues.
Step = Callable[[Carry, jax.Array, jax.Array, int], tuple[Carry, jax.Array]]

BEAM = 8  # nodes that a tree continues per depth, and children it considers


def draft(
  step: Step,
  carry: Carry,
  anchor: jax.Array,
  ids: jax.Array | None,
  drafting: Drafting,
  moment: Moment,
  vocab: int,
  max_depth: int,
) -> Proposal:
  """What `draft_tree` or `draft_chain` offers, as drafting asks.

  Args:
    step, carry, anchor, ids, drafting, moment, vocab: as in `draft_chain`.
    max_depth: D, the deepest node of a tree.
  """
  asked = (step, carry, anchor, ids, drafting, moment, vocab)
  if drafting.is_tree:
    return draft_tree(*asked, max_depth)
  return draft_chain(*asked)


def draft_chain(
  step: Step,
  carry: Carry,
  anchor: jax.Array,
  ids: jax.Array | None,
  drafting: Drafting,
  moment: Moment,
  vocab: int,
) -> Proposal:
  """A chain in which each token's law knows the tokens before it.

  A rule may treat that law as its depth's own: it asks only about the path
  that was drawn.

  Args:
    step: the drafter's.
    carry: before the anchor is read.
    anchor: i32[B].
    ids: i32[V'], token id of each column, or None.
    drafting: what to draw, P nodes.
    moment: addresses of noise.
    vocab: V, the target's.
  """
  if not drafting.num_nodes:
    return chain(anchor[:, None][:, :0])
  parents = jnp.zeros_like(anchor)[:, None]
  tokens, drafts = anchor[:, None], []
  for depth in range(drafting.num_nodes):
    carry, logits = step(carry, tokens, parents, depth)
    draft = from_marginals(logits, ids, drafting, moment, vocab, above=depth)
    tokens = draft.tokens
    drafts.append(draft)
  return _join(drafts)


def draft_tree(
  step: Step,
  carry: Carry,
  anchor: jax.Array,
  ids: jax.Array | None,
  drafting: Drafting,
  moment: Moment,
  vocab: int,
  max_depth: int,
) -> Proposal:
  """The likeliest P nodes of a beam; drafts must be certain.

  At each depth the BEAM likeliest paths go on, with BEAM children each; of all
  nodes seen, the P likeliest are drafted. A path is never likelier than its
  beginning, so these are a tree, and so is any first part of them.
  Source: EAGLE-2, arXiv 2406.16858, section 4.

  Args:
    step, carry, anchor, ids, drafting, moment, vocab: as in `draft_chain`.
    max_depth: D, the deepest node.
  """
  B, P = anchor.shape[0], drafting.num_nodes
  depths = min(max_depth, P)
  beam = max(BEAM, -(-P // depths))  # all depths together offer P nodes
  tokens, parents = anchor[:, None], jnp.zeros((B, 1), jnp.int32)
  paths, places = jnp.zeros((B, 1)), jnp.full((B, 1), -1, jnp.int32)
  levels: list[_Level] = []
  for depth in range(depths):
    carry, logits = step(carry, tokens, parents, depth)
    scores = score(logits, ids, drafting, moment, vocab, jnp.array([depth + 1]))
    k = min(beam, scores.shape[-1])
    level = _Level.of_children(paths, places, scores, k)
    width = min(beam, level.paths.shape[1])
    paths, best = jax.lax.top_k(level.paths, width)
    columns = jnp.take_along_axis(level.columns, best, axis=1)
    tokens, parents = _name(columns, ids), best // k
    places = best + sum(level.paths.shape[1] for level in levels)
    levels.append(level)
  available = sum(level.paths.shape[1] for level in levels)
  if available < P:
    raise ValueError(
      f"num_nodes is {P}, but {depths} depths of a beam of {beam} over "
      f"{scores.shape[-1]} tokens hold {available} nodes"
    )
  tree, _, best = best_of(
    [level.paths for level in levels],
    [level.parents for level in levels],
    [level.ranks for level in levels],
    P,
  )
  every = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *levels)
  chosen = jax.tree.map(
    lambda entries: jnp.take_along_axis(entries, best, axis=1), every
  )
  return Proposal(
    tokens=_name(chosen.columns, ids),
    confidence=jnp.exp(chosen.log_probs),
    margins=chosen.leads,
    tree=tree,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Level:
  """Candidates of one depth, each [B, C].

  Attributes:
    paths: f32, log probability of the path. parents: i32, place of the parent
      among all candidates. ranks: i32, among its siblings. columns: i32.
    log_probs: f32, given the parent. leads: f32, as Proposal.margins.
  """

  paths: jax.Array
  parents: jax.Array
  ranks: jax.Array
  columns: jax.Array
  log_probs: jax.Array
  leads: jax.Array

  @classmethod
  def of_children(
    cls, paths: jax.Array, places: jax.Array, scores: jax.Array, count: int
  ) -> "_Level":
    """The best children of each of f32[B, W] paths, scores f32[B, W, V']."""
    top, columns = jax.lax.top_k(scores, max(count, 2))
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    is_best = jnp.arange(top.shape[-1]) == 0
    second = jnp.where(is_best, top[..., 1:2], top[..., :1])
    entries = (top - total, columns, top - second)
    log_probs, columns, leads = (x[..., :count] for x in entries)
    log_probs = jnp.minimum(log_probs, 0.0)  # rounding must not lift a child
    like = functools.partial(jnp.broadcast_to, shape=columns.shape)
    level = cls(
      paths=paths[..., None] + log_probs,
      parents=like(places[..., None]),
      ranks=like(jnp.arange(count, dtype=jnp.int32)),
      columns=columns,
      log_probs=log_probs,
      leads=leads,
    )
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1), level)


def _name(columns: jax.Array, ids: jax.Array | None) -> jax.Array:
  return columns if ids is None else ids[columns]


def _join(drafts: list[Proposal]) -> Proposal:
  """Chains, each of which continues the one before."""

  def along(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=1)

  laws = [draft.law for draft in drafts if draft.law]
  return Proposal(
    tokens=along([draft.tokens for draft in drafts]),
    confidence=along([draft.confidence for draft in drafts]),
    margins=along([draft.margins for draft in drafts]),
    law=Law(
      probs=along([law.probs for law in laws]),
      ids=laws[0].ids,
      ranked=along([law.ranked for law in laws]),
    )
    if laws
    else None,
  )
