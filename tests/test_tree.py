"""Trees against a heap, full enumeration and walks along parents."""

import dataclasses
import heapq
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.tree import (
  Tree,
  ancestors,
  best_first,
  chain,
  descend,
  look_up,
  path_products,
)
from pallas_kernels.block_attention.reference import block_mask

# (B, D, k, P), 200 cases. Ranks are scarce, plentiful and exactly P; the last
# two take every node there is.
SHAPES = (
  (29, 1, 7, 5),
  (23, 2, 5, 11),
  (31, 3, 3, 13),
  (37, 5, 7, 17),
  (19, 7, 32, 32),
  (1, 15, 37, 67),
  (31, 2, 3, 12),
  (29, 11, 1, 11),
)


def fetched(function, *static):
  """The function compiled whole, its results as numpy arrays to loop over."""
  compiled = jax.jit(function, static_argnames=static)
  return lambda *args: jax.device_get(compiled(*args))


grow = fetched(best_first, "num_nodes")
line = fetched(chain, "batch", "num_nodes")
values_of = fetched(look_up)
pack = fetched(ancestors)
products_of = fetched(path_products)
walk = fetched(descend, "max_depth")


def random_log_scores(rng, batch, depths, ranks):
  """f32[B, D, k]: from near one-hot to near uniform, some mass not listed."""
  sharpness = rng.uniform(0.1, 5, size=(batch, depths, 1))
  logits = rng.normal(size=(batch, depths, ranks + 3)) * sharpness
  scores = np.asarray(jax.nn.log_softmax(logits))
  return -np.sort(-scores, axis=-1)[..., :ranks].astype(np.float32)


def tree_of(*fields):
  return Tree(*(field.astype(np.int32) for field in fields))


def random_tree(rng, batch, num_nodes):
  """Any parents that come first; most have several children."""
  parents = rng.integers(0, np.arange(1, num_nodes + 1), (batch, num_nodes))
  depths, ranks = np.zeros_like(parents), np.zeros_like(parents)
  for row, i in np.ndindex(*parents.shape):
    parent = parents[row, i]
    depths[row, i] = 1 + (depths[row, parent - 1] if parent else 0)
    ranks[row, i] = (parents[row, :i] == parent).sum()
  return tree_of(parents, depths, ranks)


def path_to(parents, row):
  """The rows from row up to the anchor, both included."""
  path = [int(row)]
  while path[-1]:
    path.append(int(parents[path[-1] - 1]))
  return path


def rank_paths(tree, row):
  """Each node of one batch row, as its tuple of ranks from the anchor."""
  parents, ranks = tree.parents[row], tree.ranks[row]
  return [
    tuple(int(ranks[j - 1]) for j in reversed(path_to(parents, i + 1)[:-1]))
    for i in range(len(parents))
  ]


def check_structure(tree):
  """Every row is an ancestor-closed tree, parents and good siblings first."""
  for row, parents in enumerate(tree.parents):
    assert np.all(parents >= 0), "a parent is no row"
    assert np.all(parents <= np.arange(len(parents))), "a child comes first"
    depths = np.concatenate([[0], tree.depths[row]])
    assert np.all(depths[1:] == depths[parents] + 1), "a depth skips"
    seen = set()
    for path in rank_paths(tree, row):
      assert path not in seen, "two siblings have one rank"
      seen.add(path)
      *above, rank = path
      assert rank == 0 or (*above, rank - 1) in seen, "a better sibling lacks"


def heap_values(log_scores, num_nodes):
  """Probabilities of the best nodes of one row, found one by one."""
  chance = np.exp(log_scores.astype(np.float64)).tolist()
  depths, ranks = log_scores.shape

  def value(path):
    return math.prod(chance[d][r] for d, r in enumerate(path))

  heap: list[tuple[float, tuple[int, ...]]] = []
  for rank in range(ranks):
    heapq.heappush(heap, (-value((rank,)), (rank,)))
  values: list[float] = []
  while len(values) < num_nodes:
    negative, path = heapq.heappop(heap)
    values.append(-negative)
    if len(path) < depths:
      for rank in range(ranks):
        child = (*path, rank)
        heapq.heappush(heap, (-value(child), child))
  return np.array(values)


def enumerated_best(log_scores, num_nodes):
  """The best total of one row over all ancestor-closed sets of nodes."""
  chance = np.exp(log_scores.astype(np.float64)).tolist()
  depths, ranks = log_scores.shape
  nodes = [
    path
    for depth in range(1, depths + 1)
    for path in itertools.product(range(ranks), repeat=depth)
  ]
  value = {p: math.prod(chance[d][r] for d, r in enumerate(p)) for p in nodes}
  return max(
    sum(value[path] for path in chosen)
    for chosen in itertools.combinations(nodes, num_nodes)
    if all(len(p) == 1 or p[:-1] in chosen for p in chosen)
  )


@pytest.mark.parametrize("shape", SHAPES)
def test_every_prefix_is_the_best_tree_of_its_size(shape):
  *size, num_nodes = shape
  scores = random_log_scores(np.random.default_rng(sum(shape)), *size)
  tree, log_values = grow(scores, num_nodes)
  assert tree.num_nodes == num_nodes
  check_structure(tree)
  assert np.all(np.diff(log_values, axis=1) <= 0)
  for row in range(size[0]):
    values = np.exp(log_values[row].astype(np.float64))
    best = heap_values(scores[row], num_nodes)
    np.testing.assert_allclose(values.cumsum(), best.cumsum(), rtol=1e-5)


@pytest.mark.parametrize("depths,ranks,num_nodes", [(3, 2, 5), (2, 3, 7)])
def test_no_ancestor_closed_set_has_a_larger_total(depths, ranks, num_nodes):
  scores = random_log_scores(np.random.default_rng(3), 5, depths, ranks)
  _, log_values = grow(scores, num_nodes)
  for row in range(5):
    for count in range(1, num_nodes + 1):
      total = np.exp(log_values[row, :count].astype(np.float64)).sum()
      best = enumerated_best(scores[row], count)
      np.testing.assert_allclose(total, best, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_products_along_the_path(shape):
  *size, num_nodes = shape
  scores = random_log_scores(np.random.default_rng(sum(shape)), *size)
  tree, log_values = grow(scores, num_nodes)
  for row in range(size[0]):
    products = [
      sum(scores[row, d, r] for d, r in enumerate(path))
      for path in rank_paths(tree, row)
    ]
    np.testing.assert_allclose(log_values[row], products, rtol=1e-5, atol=1e-5)


def test_a_prefix_is_the_tree_grown_to_that_size():
  scores = random_log_scores(np.random.default_rng(5), 3, 5, 17)
  whole, log_values = grow(scores, 17)
  for count in (1, 7, 16):
    part, part_values = grow(scores, count)
    np.testing.assert_array_equal(part_values, log_values[:, :count])
    for name in ("parents", "depths", "ranks"):
      np.testing.assert_array_equal(
        getattr(part, name), getattr(whole.prefix(count), name)
      )


def test_more_ranks_than_nodes_change_nothing():
  scores = random_log_scores(np.random.default_rng(6), 7, 5, 41)
  tree, log_values = grow(scores, 11)
  same, same_values = grow(scores[..., :11], 11)
  np.testing.assert_array_equal(tree.parents, same.parents)
  np.testing.assert_array_equal(log_values, same_values)


# Certain tokens tie a child with its parent: log probability 0, -0.0, or just
# above 0 where a normaliser was rounded.
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-6, -0.7])
def test_ties_keep_the_tree_closed(value):
  tree, log_values = grow(np.full((2, 5, 7), value, np.float32), 31)
  check_structure(tree)
  assert np.all(np.diff(log_values, axis=1) <= 0)


def test_mixed_ties_keep_the_tree_closed():
  rng = np.random.default_rng(7)
  scores = np.log([1, 1, 0.5, 0.25])[rng.integers(0, 4, (53, 7, 5))]
  scores = -np.sort(-scores.astype(np.float32), axis=-1)
  scores[scores == 0] = rng.choice([0.0, -0.0], (scores == 0).sum())
  tree, _ = grow(scores, 23)
  check_structure(tree)


def test_excluded_tokens_come_last_with_probability_0():
  scores = random_log_scores(np.random.default_rng(8), 11, 3, 5)
  scores[:, 0, 2:] = scores[:, 1, 1:] = scores[:, 2, 3:] = -np.inf
  tree, log_values = grow(scores, 23)
  check_structure(tree)
  # 2 of depth 1, 2 of depth 2 and 6 of depth 3 are possible.
  assert np.all(np.isfinite(log_values[:, :10]))
  assert np.all(np.isneginf(log_values[:, 10:]))


def test_a_row_without_any_token_still_has_a_tree():
  scores = random_log_scores(np.random.default_rng(9), 11, 3, 5)
  scores[0] = -np.inf
  tree, log_values = grow(scores, 23)
  check_structure(tree)
  assert np.all(np.isneginf(log_values[0]))
  assert np.all(np.isfinite(log_values[1:]))
  assert not np.any(np.isnan(log_values))


def test_rows_of_a_batch_are_grown_independently():
  scores = random_log_scores(np.random.default_rng(10), 11, 3, 5)
  tree, log_values = grow(scores, 23)
  for row in range(5):
    alone, alone_values = grow(scores[row : row + 1], 23)
    np.testing.assert_array_equal(alone_values[0], log_values[row])
    np.testing.assert_array_equal(alone.parents[0], tree.parents[row])


def test_too_few_nodes_to_choose_from_are_refused():
  with pytest.raises(ValueError, match="num_nodes is 5.* 3 nodes"):
    best_first(jnp.zeros((1, 3, 1)), 5)
  with pytest.raises(ValueError, match="num_nodes is 15.* 14 nodes"):
    best_first(jnp.zeros((2, 3, 2)), 15)
  with pytest.raises(ValueError, match="num_nodes is 0"):
    best_first(jnp.zeros((2, 3, 2)), 0)


def test_one_rank_per_depth_grows_a_chain():
  scores = random_log_scores(np.random.default_rng(11), 3, 7, 1)
  tree, _ = grow(scores, 5)
  for name in ("parents", "depths", "ranks"):
    np.testing.assert_array_equal(
      getattr(tree, name), getattr(line(3, 5), name)
    )


def corrupted(tree, **edits):
  """The tree with nodes of batch row 0 overwritten: name=(node, value)."""
  edited = {}
  for name, (node, value) in edits.items():
    edited[name] = getattr(tree, name).copy()
    edited[name][0, node] = value
  return dataclasses.replace(tree, **edited)


@pytest.mark.parametrize(
  "edits,complaint",
  [
    ({"parents": (3, 4)}, "a child comes first"),
    ({"parents": (3, -1)}, "a parent is no row"),
    ({"depths": (12, 5)}, "a depth skips"),
    ({"ranks": (0, 1)}, "a better sibling lacks"),
    ({"ranks": (1, 0), "parents": (1, 0), "depths": (1, 1)}, "one rank"),
  ],
)
def test_the_structure_check_sees_a_corrupted_tree(edits, complaint):
  tree, _ = grow(np.full((11, 3, 5), -0.7, np.float32), 23)
  tree = tree.prefix(13)
  check_structure(tree)
  with pytest.raises(AssertionError, match=complaint):
    check_structure(corrupted(tree, **edits))


def test_the_structure_check_sees_an_unstable_top_k(monkeypatch):
  stable = jax.lax.top_k

  def unstable(operand, k):
    values, indices = stable(operand[..., ::-1], k)
    return values, operand.shape[-1] - 1 - indices

  monkeypatch.setattr(jax.lax, "top_k", unstable)
  tree, _ = jax.device_get(best_first(jnp.zeros((2, 3, 5)), 13))
  with pytest.raises(AssertionError):
    check_structure(tree)


def check_packed(packed, tree):
  """Each row's bits are those of a walk to the anchor, and no others."""
  batch, num_nodes = tree.parents.shape
  assert packed.shape == (batch, num_nodes + 1, num_nodes // 32 + 1)
  assert packed.dtype == np.uint32
  packed = packed.tolist()
  for row, i in np.ndindex(batch, num_nodes + 1):
    expected = sum(1 << j for j in path_to(tree.parents[row], i))
    words = enumerate(packed[row][i])
    assert sum(word << 32 * w for w, word in words) == expected


@pytest.mark.parametrize("num_nodes", [1, 31, 32, 33, 67])
def test_ancestors_are_those_of_a_walk_to_the_anchor(num_nodes):
  tree = random_tree(np.random.default_rng(num_nodes), 3, num_nodes)
  check_packed(pack(tree), tree)
  causal = line(3, num_nodes)
  check_packed(pack(causal), causal)


def test_the_packed_check_sees_wrong_bit_and_word_order():
  tree = random_tree(np.random.default_rng(13), 2, 37)
  packed = pack(tree)
  bits = np.unpackbits(packed.view(np.uint8), axis=-1, bitorder="little")
  big_endian = np.packbits(bits, axis=-1, bitorder="big").view(np.uint32)
  for mutant in (packed[..., ::-1], big_endian, packed & ~np.uint32(1)):
    with pytest.raises(AssertionError):
      check_packed(mutant, tree)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 67])
def test_unpacking_undoes_packing(count):
  mask = np.random.default_rng(count).random((2, 5, count)) < 0.5
  words = -(-count // 32)
  padded = np.pad(mask, ((0, 0), (0, 0), (0, 32 * words - count)))
  packed = np.packbits(padded, axis=-1, bitorder="little").view(np.uint32)
  unpacked = block_mask(count, packed, None)
  assert unpacked.dtype == bool
  np.testing.assert_array_equal(unpacked, mask)


def test_the_mask_of_a_chain_is_causal():
  mask = block_mask(38, pack(line(2, 37)), None)
  np.testing.assert_array_equal(mask, np.tri(38, dtype=bool)[None].repeat(2, 0))


@pytest.mark.parametrize("num_nodes", [1, 17, 67])
def test_path_products_multiply_a_node_and_its_ancestors(num_nodes):
  rng = np.random.default_rng(num_nodes)
  tree = random_tree(rng, 3, num_nodes)
  chance = rng.uniform(0.3, 1, size=(3, num_nodes)).astype(np.float32)
  chance[1, 0] = 0
  products = products_of(tree, chance)
  for row, i in np.ndindex(3, num_nodes):
    path = path_to(tree.parents[row], i + 1)[:-1]
    expected = np.prod([chance[row, j - 1] for j in path])
    np.testing.assert_allclose(products[row, i], expected, rtol=1e-5)


def test_path_products_of_the_lists_are_the_trees_values():
  scores = random_log_scores(np.random.default_rng(14), 11, 3, 5)
  tree, log_values = grow(scores, 23)
  chance = np.exp(values_of(tree, scores))
  np.testing.assert_allclose(
    products_of(tree, chance), np.exp(log_values), rtol=1e-4
  )


def test_look_up_takes_each_nodes_rank_of_its_depth():
  scores = random_log_scores(np.random.default_rng(15), 11, 3, 5)
  tree, _ = grow(scores, 23)
  ranked = np.random.default_rng(16).integers(0, 997, size=(11, 3, 5))
  tokens = values_of(tree, ranked)
  for row, i in np.ndindex(11, 23):
    depth, rank = tree.depths[row, i], tree.ranks[row, i]
    assert tokens[row, i] == ranked[row, depth - 1, rank]


def walked(parents, tokens, chosen):
  """The rows of one batch row's walk, the anchor first."""
  path = [0]
  while True:
    children = [i + 1 for i, p in enumerate(parents) if p == path[-1]]
    fitting = [c for c in children if tokens[c - 1] == chosen[path[-1]]]
    if not fitting:
      return path
    path.append(fitting[0])


# Tokens of one depth are distinct in the first case; in the second, equal
# siblings are frequent.
@pytest.mark.parametrize("distinct", [True, False])
def test_descending_takes_the_child_the_target_chose(distinct):
  rng = np.random.default_rng(17)
  tree, _ = grow(random_log_scores(rng, 97, 5, 7), 23)
  if distinct:
    ranked = rng.permuted(np.broadcast_to(np.arange(7), (97, 5, 7)), axis=-1)
    tokens = values_of(tree, ranked)
  else:
    tokens = rng.integers(0, 3, size=(97, 23))
  chosen = rng.integers(0, 7 if distinct else 3, size=(97, 24))
  path, accepted = walk(tree, tokens, chosen, 5)
  assert path.shape == (97, 6)
  for row in range(97):
    expected = walked(tree.parents[row], tokens[row], chosen[row])
    assert accepted[row] == len(expected) - 1
    expected += expected[-1:] * (6 - len(expected))
    np.testing.assert_array_equal(path[row], expected)
  assert {0, 1, 2, 3} <= set(accepted.tolist())


def test_descending_stops_at_the_depth_asked_for():
  tokens = np.full((2, 7), 3)
  path, accepted = walk(line(2, 7), tokens, np.full((2, 8), 3), 4)
  np.testing.assert_array_equal(accepted, [4, 4])
  np.testing.assert_array_equal(path, [[0, 1, 2, 3, 4]] * 2)


def test_descending_a_chain_accepts_the_leading_run_of_matches():
  rng = np.random.default_rng(18)
  tokens = rng.integers(0, 2, size=(211, 5))
  chosen = rng.integers(0, 2, size=(211, 6))
  path, accepted = walk(line(211, 5), tokens, chosen, 5)
  for row in range(211):
    run = 0
    while run < 5 and tokens[row, run] == chosen[row, run]:
      run += 1
    assert accepted[row] == run
    np.testing.assert_array_equal(path[row], np.minimum(np.arange(6), run))


def test_an_empty_chain_accepts_nothing():
  empty = line(3, 0)
  path, accepted = walk(
    empty, np.zeros((3, 0), np.int32), np.array([[4], [5], [6]]), 2
  )
  np.testing.assert_array_equal(path, np.zeros((3, 3)))
  np.testing.assert_array_equal(accepted, [0, 0, 0])
  np.testing.assert_array_equal(pack(empty), np.ones((3, 1, 1)))
