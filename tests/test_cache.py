"""The cache's slots: written behind the committed, void until committed."""

import jax.numpy as jnp
import numpy as np

from dflash_jax.cache import KVCache, Rows


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
  """Every key of layer l is value + l, every value 100 more."""
  keys = [jnp.full((batch, 2, count, 5), float(value + i)) for i in range(2)]
  return Rows(tuple(keys), tuple(key + 100 for key in keys))


def committed(cache, length):
  """The cache with `length` void slots committed."""
  return cache.extend(rows(len(length), 5, 0), jnp.asarray(length))


def test_rows_land_behind_each_rows_own_length():
  cache = committed(new_cache(), [0, 2, 5])
  cache = cache.extend(rows(3, 3, 7), jnp.array([1, 3, 0]))
  np.testing.assert_array_equal(cache.length, [1, 5, 5])
  for layer in range(2):
    keys, values = cache.read(layer)
    written = np.asarray(keys[:, 0, :, 0] == 7 + layer)
    expected = np.zeros((3, 11), bool)
    expected[0, 0:3] = expected[1, 2:5] = expected[2, 5:8] = True
    np.testing.assert_array_equal(written, expected)
    written = np.asarray(values[:, 1, :, 4] == 107 + layer)
    np.testing.assert_array_equal(written, expected)


def test_one_row_and_many_rows_write_alike():
  one = committed(new_cache(1), [4]).extend(rows(1, 3, 7), jnp.array([2]))
  many = committed(new_cache(2), [4, 5])
  many = many.extend(rows(2, 3, 7), jnp.array([2, 3]))
  np.testing.assert_array_equal(one.read(0)[0][0], many.read(0)[0][0])


def test_slots_count_only_once_committed():
  cache = new_cache().extend(rows(3, 4, 7), jnp.array([0, 1, 4]))
  np.testing.assert_array_equal(cache.length, [0, 1, 4])
  expected = np.arange(11) < np.array([0, 1, 4])[:, None, None]
  np.testing.assert_array_equal(cache.committed_mask(), expected)


def test_rejected_rows_are_overwritten_by_the_next_ones():
  cache = new_cache().extend(rows(3, 4, 7), jnp.array([2, 2, 2]))
  cache = cache.extend(rows(3, 3, 9), jnp.array([1, 1, 1]))
  np.testing.assert_array_equal(
    cache.read(0)[0][1, 1, :, 3], [7, 7, 9, 9, 9, 0, 0, 0, 0, 0, 0]
  )


def test_positions_go_on_from_the_committed_slots():
  cache = committed(new_cache(2), [0, 2])
  np.testing.assert_array_equal(cache.positions(2), [[0, 1], [2, 3]])


def test_rows_follow_a_path_and_are_padded_with_void_ones():
  keys = 10.0 + jnp.arange(6)[:, None] + jnp.zeros((3, 2, 6, 5))
  some = Rows((keys, keys), (keys + 100, keys + 100))
  path = jnp.array([[0, 2, 5, 5], [0, 1, 2, 3], [0, 0, 0, 0]])
  followed = some.follow(path)
  for row in range(3):
    np.testing.assert_array_equal(
      followed.keys[1][row, 1, :, 3], 10 + np.asarray(path[row])
    )
    np.testing.assert_array_equal(
      followed.values[0][row, 0, :, 0], 110 + np.asarray(path[row])
    )
  padded = followed.pad(7)
  assert padded.values[1].shape == (3, 2, 7, 5)
  np.testing.assert_array_equal(padded.keys[0][:, :, :4], followed.keys[0])
  assert not np.any(padded.keys[0][:, :, 4:])
  assert followed.pad(4).keys[0].shape == (3, 2, 4, 5)
