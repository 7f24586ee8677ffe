"""The cache's slots: appended, committed, overwritten."""

import jax.numpy as jnp
import numpy as np

from dflash_jax.cache import KVCache


def new_cache(batch=3, capacity=11):
  return KVCache.create(
    num_layers=2,
    batch=batch,
    num_kv_heads=2,
    capacity=capacity,
    head_width=5,
    dtype=jnp.float32,
  )


def rows(batch, count, value):
  return jnp.full((batch, count, 2, 5), float(value))


def test_rows_land_after_each_rows_own_length():
  cache = new_cache().commit(jnp.array([0, 2, 5]))
  cache = cache.append(1, rows(3, 3, 7), rows(3, 3, 8))
  keys, values = cache.read(1)
  written = np.asarray(keys[:, 0, :, 0] == 7)
  expected = np.zeros((3, 11), bool)
  expected[0, 0:3] = expected[1, 2:5] = expected[2, 5:8] = True
  np.testing.assert_array_equal(written, expected)
  np.testing.assert_array_equal(np.asarray(values[:, 1, :, 4] == 8), expected)
  assert not np.any(cache.read(0)[0])


def test_one_row_and_many_rows_write_alike():
  one = (
    new_cache(1).commit(jnp.array([4])).append(0, rows(1, 3, 7), rows(1, 3, 8))
  )
  many = new_cache(2).commit(jnp.array([4, 6]))
  many = many.append(0, rows(2, 3, 7), rows(2, 3, 8))
  np.testing.assert_array_equal(one.read(0)[0][0], many.read(0)[0][0])


def test_appended_slots_count_only_once_committed():
  cache = new_cache().append(0, rows(3, 4, 7), rows(3, 4, 8))
  np.testing.assert_array_equal(cache.length, [0, 0, 0])
  cache = cache.commit(jnp.array([0, 1, 4]))
  np.testing.assert_array_equal(cache.length, [0, 1, 4])
  expected = np.arange(11) < np.array([0, 1, 4])[:, None, None]
  np.testing.assert_array_equal(cache.committed_mask(), expected)


def test_rejected_slots_are_overwritten_by_the_next_pass():
  cache = new_cache().append(0, rows(3, 4, 7), rows(3, 4, 7))
  cache = cache.commit(jnp.array([2, 2, 2]))
  cache = cache.append(0, rows(3, 4, 9), rows(3, 4, 9))
  np.testing.assert_array_equal(
    cache.read(0)[0][1, 1, :, 3], [7, 7, 9, 9, 9, 9, 0, 0, 0, 0, 0]
  )


def test_a_token_sees_itself_and_what_is_before_it():
  cache = new_cache(2, 5).commit(jnp.array([0, 2]))
  expected = [
    [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
  ]
  np.testing.assert_array_equal(cache.causal_mask(2), np.array(expected) == 1)
  np.testing.assert_array_equal(cache.positions(2), [[0, 1], [2, 3]])


def test_a_tree_row_sees_committed_slots_and_its_ancestors():
  cache = new_cache(2, 7).commit(jnp.array([1, 3]))
  ancestors = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
  mask = cache.tree_mask(jnp.asarray(np.stack([ancestors] * 2)))
  expected = np.zeros((2, 3, 7), bool)
  for row, length in enumerate((1, 3)):
    expected[row, :, :length] = True
    expected[row, :, length : length + 3] = ancestors
  np.testing.assert_array_equal(mask, expected)


def test_a_chain_is_the_tree_of_all_earlier_rows():
  cache = new_cache(3, 11).commit(jnp.array([0, 2, 5]))
  ancestors = jnp.tril(jnp.ones((3, 4, 4), bool))
  np.testing.assert_array_equal(
    cache.tree_mask(ancestors), cache.causal_mask(4)
  )


def test_a_committed_path_moves_up_and_nothing_before_it_changes():
  for batch in (1, 3):
    length = jnp.array([2, 0, 5])[:batch]
    cache = new_cache(batch).append(0, rows(batch, 5, 7), rows(batch, 5, 7))
    cache = cache.commit(length)
    values = 10.0 + jnp.arange(6)[None, :, None, None]
    values = jnp.broadcast_to(values, (batch, 6, 2, 5))
    cache = cache.append(0, values, values + 100)
    path = jnp.tile(jnp.array([[0, 2, 5, 5]]), (batch, 1))
    count = jnp.array([3, 1, 0])[:batch]
    cache = cache.commit(count, path)
    np.testing.assert_array_equal(cache.length, length + count)
    for row in range(batch):
      n = int(length[row])
      keys = cache.read(0)[0][row, 1, :, 3]
      np.testing.assert_array_equal(keys[:n], [7] * n)
      np.testing.assert_array_equal(keys[n : n + 3], [10, 12, 15])
      kept = cache.read(0)[1][row, 0, n : n + 3, 0]
      np.testing.assert_array_equal(kept, [110, 112, 115])
      assert not np.any(cache.read(1)[0])
