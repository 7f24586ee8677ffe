"""A tree of drafts: how it is grown, addressed, masked and walked.

A node is one token at one depth; its parent is another node or the anchor. The
drafter's marginals are independent between depths, so all parents at a depth
choose from the same ranked list, and a node is its parent and a rank.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention.reference import pack_mask

WORD = 32  # bits of a word of a packed mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
  """The shape of P nodes per batch row, parents before their children.

  Attributes:
    parents: i32[B, P], row of each node's parent. Row 0 is the anchor, row
      i + 1 is node i.
    depths: i32[B, P], 1..D; the anchor's depth is 0.
    ranks: i32[B, P], which entry of its depth's list the node takes.
  """

  parents: jax.Array
  depths: jax.Array
  ranks: jax.Array

  @property
  def num_nodes(self) -> int:
    """P, the anchor not counted."""
    return self.parents.shape[1]

  def prefix(self, num_nodes: int) -> "Tree":
    """The first nodes alone; a tree too, since parents come first."""
    return Tree(
      parents=self.parents[:, :num_nodes],
      depths=self.depths[:, :num_nodes],
      ranks=self.ranks[:, :num_nodes],
    )


def chain(batch: int, num_nodes: int) -> Tree:
  """The best token of each depth, one after the other."""
  rows = jnp.arange(num_nodes, dtype=jnp.int32)
  rows = jnp.broadcast_to(rows, (batch, num_nodes))
  return Tree(parents=rows, depths=rows + 1, ranks=jnp.zeros_like(rows))


def best_first(log_scores: jax.Array, num_nodes: int) -> tuple[Tree, jax.Array]:
  """The tree with the largest sum of path probabilities (DDTree, 2604.12989).

  Nodes come in descending order of path probability, so that every prefix is
  itself the best tree of its size. Given all D depths, k = min(P, V) ranks
  are enough to be exact.

  Args:
    log_scores: f32[B, D, k], log probabilities, descending along k; -inf for
      a token that must not be drafted. Nodes of probability 0 come last.
    num_nodes: P, at least 1.

  Returns:
    The tree, and f32[B, P], the log of each node's path probability.
  """
  B, D, k = log_scores.shape
  available = sum(k**depth for depth in range(1, D + 1))
  if not 1 <= num_nodes <= available:
    raise ValueError(
      f"num_nodes is {num_nodes}, but {D} depths of {k} ranks hold from 1 to "
      f"{available} nodes"
    )
  # A parent may tie with its child but never lose to it, or the child could be
  # kept alone: probabilities rounded above 1 and -0.0 (below 0.0 to top_k).
  log_scores = jnp.where(log_scores >= 0, 0.0, log_scores)

  score = jnp.zeros((B, 1), log_scores.dtype)
  scores, parents, ranks = [], [], []
  first, end = -1, 0  # the parents' places among all candidates; anchor: -1
  for depth in range(min(D, num_nodes)):
    above, rank = _pairs(score.shape[1], k, num_nodes)
    grown = score[:, above] + log_scores[:, depth, rank]
    score, best = jax.lax.top_k(grown, min(num_nodes, len(rank)))
    scores.append(score)
    parents.append(first + jnp.asarray(above)[best])
    ranks.append(jnp.asarray(rank)[best])
    first, end = end, end + score.shape[1]
  tree, score, _ = best_of(scores, parents, ranks, num_nodes)
  return tree, score


def best_of(
  scores: list[jax.Array],
  parents: list[jax.Array],
  ranks: list[jax.Array],
  num_nodes: int,
) -> tuple[Tree, jax.Array, jax.Array]:
  """The likeliest nodes of the candidates of every depth.

  Args:
    scores: f32[B, C] per depth, log of path probabilities; no candidate's is
      above its parent's.
    parents: i32[B, C] per depth, place among all candidates; -1 the anchor.
    ranks: i32[B, C] per depth; among equals, better ranks come first.
    num_nodes: P.

  Returns:
    The tree, f32[B, P] the scores of its nodes, and their places i32[B, P].
  """
  # Stable: of equals, the shallow and the well ranked come first, so a node
  # never precedes its parent or a better sibling.
  score, best = jax.lax.top_k(jnp.concatenate(scores, axis=1), num_nodes)
  parent = jnp.take_along_axis(jnp.concatenate(parents, axis=1), best, axis=1)
  sizes = [level.shape[1] for level in scores]
  depths = np.repeat(np.arange(1, len(sizes) + 1, dtype=np.int32), sizes)
  tree = Tree(
    parents=_rows(parent, best),
    depths=jnp.asarray(depths)[best],
    ranks=jnp.take_along_axis(jnp.concatenate(ranks, axis=1), best, axis=1),
  )
  return tree, score, best


def _pairs(
  num_parents: int, num_ranks: int, keep: int
) -> tuple[np.ndarray, np.ndarray]:
  """The (parent, rank) pairs, 0-based, that can be among the best `keep`.

  Both are sorted by score, so (i + 1)(j + 1) - 1 pairs are at least as good as
  (i, j). That leaves about keep ln(keep) of num_parents * num_ranks.
  """
  parent, rank = np.divmod(
    np.arange(num_parents * num_ranks, dtype=np.int32), num_ranks
  )
  possible = (parent + 1) * (rank + 1) <= keep
  return parent[possible], rank[possible]


def _rows(places: jax.Array, kept: jax.Array) -> jax.Array:
  """Where in kept i32[B, P] each of places i32[B, P] is, plus 1; else 0."""
  rows = jnp.arange(1, kept.shape[1] + 1, dtype=jnp.int32)
  return jnp.where(places[..., None] == kept[:, None], rows, 0).sum(axis=-1)


def look_up(tree: Tree, ranked: jax.Array) -> jax.Array:
  """ranked [B, D, k] -> [B, P], the entry at each node's depth and rank."""
  B, D, k = ranked.shape
  entries = (tree.depths - 1) * k + tree.ranks
  return jnp.take_along_axis(ranked.reshape(B, D * k), entries, axis=1)


def ancestors(tree: Tree, window: int | None = None) -> jax.Array:
  """Which rows each row's token may see, as the packed bits a kernel wants.

  Args:
    tree: the nodes behind the anchor.
    window: how many last positions a token sees, its own included.

  Returns:
    u32[B, P + 1, W], W = ceil((P + 1) / 32). Bit j % 32 (bit 0 is the least
    significant) of word j // 32 of row i is set iff row j is row i itself or
    one of its ancestors, the anchor included, within the window.
  """
  rows = np.arange(tree.num_nodes + 1)
  own = np.zeros((len(rows), -(-len(rows) // WORD)), np.uint32)
  own[rows, rows // WORD] = np.uint32(1) << (rows % WORD).astype(np.uint32)
  seen = jnp.broadcast_to(own, (tree.parents.shape[0], *own.shape))
  for jump in _jumps(tree):
    seen |= jnp.take_along_axis(seen, jump[..., None], axis=1)
  if window is None or window > tree.num_nodes:
    return seen
  depths = jnp.pad(tree.depths, ((0, 0), (1, 0)))
  return seen & pack_mask(depths[:, :, None] - depths[:, None] < window)


def path_products(tree: Tree, chance: jax.Array) -> jax.Array:
  """chance f32[B, P] -> f32[B, P], multiplied along the path to each node."""
  product = jnp.pad(chance, ((0, 0), (1, 0)), constant_values=1)
  for jump in _jumps(tree):
    product *= jnp.take_along_axis(product, jump, axis=1)
  return product[:, 1:]


def _jumps(tree: Tree) -> list[jax.Array]:
  """i32[B, P + 1] each: the ancestor of every row 1, 2, 4, ... levels up.

  The anchor stands in for all that is above it. A row that gathers through
  every jump in turn has gathered its whole path, were the tree a chain.
  """
  jump = jnp.pad(tree.parents, ((0, 0), (1, 0)))
  jumps = []
  for _ in range(tree.num_nodes.bit_length()):
    jumps.append(jump)
    jump = jnp.take_along_axis(jump, jump, axis=1)
  return jumps


def descend(
  tree: Tree, tokens: jax.Array, chosen: jax.Array, max_depth: int
) -> tuple[jax.Array, jax.Array]:
  """Walks from the anchor for as long as a child is what the target chose.

  Args:
    tree: P nodes per row.
    tokens: i32[B, P], of the nodes. Of siblings with equal tokens, the first
      is taken.
    chosen: i32[B, P + 1], the target's token after the anchor and each node.
    max_depth: the most steps to take.

  Returns:
    path i32[B, max_depth + 1], the row reached at each depth, from row 0 on;
    past the last node accepted, its row again. And accepted i32[B].
  """
  wanted = jnp.take_along_axis(chosen, tree.parents, axis=1)
  past = tree.num_nodes + 1
  rows = jnp.where(tokens == wanted, jnp.arange(1, past), past)
  row = jnp.zeros_like(chosen[:, 0])
  path = [row]
  for _ in range(max_depth):
    children = jnp.where(tree.parents == row[:, None], rows, past)
    child = children.min(axis=1, initial=past)
    row = jnp.where(child < past, child, row)
    path.append(row)
  walk = jnp.stack(path, axis=1).astype(jnp.int32)
  steps = walk[:, 1:] != walk[:, :-1]
  return walk, steps.sum(axis=1, dtype=jnp.int32)
