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
