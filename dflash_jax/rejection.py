"""Rejection rules for drawn drafts: how likely each is kept, what replaces it.

For drafters with a trimmed head, and for trees; chains of drafters that know
every token take block_verify. Every rule is two pure steps, so that its law can
be enumerated: odds of acceptance, and the residual law that a rejection draws
from. p_i and q_i are the target's and the drafter's laws at depth i; x_i the
draft.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.proposal import Law
from dflash_jax.tree import Tree
from pallas_kernels.block_verify import rule

TINY = float(np.finfo(np.float32).tiny)


def token_odds(probs: jax.Array, tokens: jax.Array, law: Law) -> jax.Array:
  """f32[B, P]: min(1, p_i(x_i) / q_i(x_i)), each to be met in turn.

  Source: Leviathan et al., arXiv 2211.17192, and Chen et al., 2302.01318.

  Args:
    probs: f32[B, P + 1, V], the target's laws after the anchor and each draft.
    tokens: i32[B, P], a chain of drawn drafts.
    law: that they were drawn from.
  """
  return jnp.minimum(_ratios(probs, tokens, law), 1.0)


def block_odds(
  probs: jax.Array, tokens: jax.Array, law: Law
) -> tuple[jax.Array, jax.Array]:
  """Odds of the block rule, of which the LAST one met decides.

  P_0 = 1, P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i));
  S_i = sum_y max(P_i p_{i+1}(y) - q_{i+1}(y), 0);
  h_i = S_i / (S_i + 1 - P_i) for i < P, and h_P = P_P.
  Source: Sun et al., arXiv 2403.10444, algorithm 2.

  Args:
    probs, tokens, law: as in `token_odds`.

  Returns:
    h f32[B, P], and P_0..P_P f32[B, P + 1].
  """
  P = tokens.shape[1]
  weights = rule.block_weights(_ratios(probs, tokens, law))
  inner = weights[:, : P - 1]
  excess = _excess_mass(probs[:, 1:P], inner, law, slice(1, P))
  odds = jnp.concatenate(
    [rule.block_odds(excess, inner), weights[:, P - 1 :]], axis=1
  )
  return odds, jnp.pad(weights, ((0, 0), (1, 0)), constant_values=1.0)


def residual(
  probs: jax.Array, scale: jax.Array, law: Law, depth: jax.Array
) -> jax.Array:
  """f32[B, V], proportional to the law of what replaces a rejected draft.

  Args:
    probs: f32[B, V], the target's law where the rejected draft stood.
    scale: f32[B]; 1 in the token rule, P_tau in the block rule.
    law: of the drafts.
    depth: i32[B], 0-based depth of the rejected draft; len(depths) if none was
      rejected, and the target's own law is returned.
  """
  D = law.probs.shape[1]
  rejected = depth < D
  index = jnp.minimum(depth, D - 1)[:, None, None]
  q = jnp.take_along_axis(law.probs, index, axis=1)[:, 0]
  q = jnp.where(rejected[:, None], q, 0.0)
  scaled = probs * jnp.where(rejected, scale, 1.0)[:, None]
  left = jnp.maximum(_columns(scaled, law.ids) - q, 0.0)
  weights = _put_columns(scaled, left, law.ids)
  # Rounding alone can reject a draft of a law that equals the target's.
  return jnp.where(weights.sum(-1, keepdims=True) > 0, weights, probs)


def accept_siblings(
  probs: jax.Array, tree: Tree, law: Law, draws: jax.Array, max_depth: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Multi-round rejection over a tree of siblings drawn without replacement.

  At a node, r starts as the target's law. Child j is kept with odds
  min(1, r(c_j) / q_j(c_j)), and the walk goes on there; else r becomes
  norm(max(r - q_j, 0)), and q_{j+1} is q_j without c_j. If all fail, r is what
  the round's last token is drawn from.
  Source: SpecInfer, arXiv 2305.09781, algorithm 2.

  All nodes of a depth share one ordered draw: only one parent per depth is ever
  reached, and which one was decided before that draw is looked at.

  Args:
    probs: f32[B, P + 1, V], after the anchor and each node.
    tree: of the nodes.
    law: the tree's labels, and what they were drawn from.
    draws: f32[B, P], uniform in (0, 1].
    max_depth: D.

  Returns:
    path i32[B, D + 1] and accepted i32[B], as in Verdict; weights f32[B, V] of
    the token that ends the round; and odds f32[B, P] of every node that was
    offered on the way, -1 of the others.
  """
  walk = functools.partial(_walk, ids=law.ids, max_depth=max_depth)
  return jax.vmap(walk)(probs, tree, law.probs, law.ranked, draws)


def _walk(probs, tree, q_all, ranked, draws, *, ids, max_depth):
  """`accept_siblings` of one row."""
  D = q_all.shape[0]

  def enter(row, depth):
    """The state on arrival at a row, whose children are at 0-based depth."""
    target = probs[row]
    columns = _columns(target, ids)
    q = jnp.where(depth < D, q_all[jnp.minimum(depth, D - 1)], 0.0)
    outside = target.sum() - columns.sum()
    return row, depth, columns, jnp.float32(1.0), outside, q

  def visit(node, carry):
    state, path, odds = carry
    row, depth, columns, scale, outside, q = state
    column = ranked[tree.depths[node] - 1, tree.ranks[node]]
    offered = (tree.parents[node] == row) & (q[column] > 0)
    ratio = jnp.minimum(columns[column] / jnp.maximum(q[column], TINY), 1.0)
    kept = offered & (draws[node] <= ratio)
    left = jnp.maximum(columns - q, 0.0)
    mass = left.sum() + scale * outside
    shrink = jnp.where(mass > 0, 1.0 / jnp.where(mass > 0, mass, 1.0), 1.0)
    others = q.at[column].set(0.0)
    rest = others.sum()
    rejected = (
      row,
      depth,
      jnp.where(mass > 0, left * shrink, columns),
      scale * shrink,
      outside,
      others / jnp.where(rest > 0, rest, 1.0),
    )
    state = jax.lax.cond(
      kept,
      lambda: enter(node + 1, depth + 1),
      lambda: jax.tree.map(
        lambda new, old: jnp.where(offered, new, old), rejected, state
      ),
    )
    odds = odds.at[node].set(jnp.where(offered, ratio, -1.0))
    return state, path.at[state[1]].set(state[0]), odds

  path = jnp.zeros((max_depth + 1,), jnp.int32)
  start = enter(jnp.int32(0), jnp.int32(0))
  odds = jnp.zeros(draws.shape, jnp.float32)
  state, path, odds = jax.lax.fori_loop(
    0, len(draws), visit, (start, path, odds)
  )
  row, accepted, columns, scale, _, _ = state
  weights = _put_columns(probs[row] * scale, columns, ids)
  steps = jnp.arange(max_depth + 1)
  return jnp.where(steps > accepted, row, path), accepted, weights, odds


def _ratios(probs: jax.Array, tokens: jax.Array, law: Law) -> jax.Array:
  """f32[B, P]: p_i(x_i) / q_i(x_i)."""
  P = tokens.shape[1]
  p = jnp.take_along_axis(probs[:, :P], tokens[..., None], axis=-1)
  q = jnp.take_along_axis(law.probs[:, :P], law.ranked[:, :P, :1], axis=-1)
  return (p / q)[..., 0]


def _excess_mass(
  probs: jax.Array, scale: jax.Array, law: Law, depths: slice
) -> jax.Array:
  """f32[B, T]: sum over tokens of max(scale p - q, 0)."""
  scaled = probs * scale[..., None]
  columns = _columns(scaled, law.ids)
  inside = jnp.maximum(columns - law.probs[:, depths], 0.0).sum(axis=-1)
  return inside + scaled.sum(axis=-1) - columns.sum(axis=-1)


def _columns(values: jax.Array, ids: jax.Array | None) -> jax.Array:
  """values f32[..., V] at the draft law's columns, f32[..., V']."""
  return values if ids is None else jnp.take(values, ids, axis=-1)


def _put_columns(
  values: jax.Array, columns: jax.Array, ids: jax.Array | None
) -> jax.Array:
  """values f32[..., V] with the draft law's columns replaced."""
  if ids is None:
    return columns
  return values.at[..., ids].set(
    columns, indices_are_sorted=True, unique_indices=True
  )
