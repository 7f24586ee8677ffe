"""The cache's slots: written behind the committed, void until committed."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dflash_jax.cache import KVCache, Pages, Rows, Trunk


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


# --- Pages and trunks ---------------------------------------------------------


def numbered_cache(batch=2, capacity=13):
  """Slot s of row b, head g, holds 100 b + 10 g + s / 10; values 1000 more."""
  cache = new_cache(batch, capacity)
  b, g, s = np.ogrid[:batch, :2, :capacity]
  marks = (100.0 * b + 10 * g + s / 10)[..., None] + np.zeros((5,))
  marks = jnp.asarray(marks, jnp.float32)
  return dataclasses.replace(
    cache, keys=(marks, -marks), values=(marks + 1000, marks - 1000)
  )


def test_pages_are_cut_from_one_row_and_pasted_into_another():
  pages = numbered_cache().cut(1, 3, Pages(2, 4))
  assert pages.keys[0].shape == (2, 2, 4, 5)
  expected = 110 + np.arange(3, 11).reshape(2, 4) / 10
  np.testing.assert_allclose(pages.keys[0][:, 1, :, 2], expected)
  np.testing.assert_allclose(pages.values[1][:, 1, :, 0], expected - 1000)
  pasted = new_cache(3, 17).paste(2, 8, pages)
  np.testing.assert_array_equal(pasted.length, [0, 0, 0])
  row = np.asarray(pasted.keys[0][2, 1, :, 4])
  np.testing.assert_allclose(row[8:16], expected.ravel())
  assert not row[:8].any() and not row[16:].any()
  assert not np.any(pasted.values[1][:2])


def test_slots_of_pages_roll_across_their_borders():
  pages = numbered_cache().cut(0, 0, Pages(3, 4))
  rolled = pages.roll(jnp.int32(1)).keys[0][:, 0, :, 0]
  np.testing.assert_allclose(rolled.ravel() * 10, [11, *range(11)], atol=1e-4)


def test_a_row_that_leans_on_a_trunk_keeps_the_rest_alone():
  """Its own slots begin behind the trunk; what it has committed stays."""
  row = numbered_cache(1).reopen(jnp.array([9]))
  keys = tuple(x[0, :, :7] for x in row.keys)
  values = tuple(x[0, :, :7] for x in row.values)
  trunk = Trunk(keys, values, jnp.int32(6))
  for member, own in ((True, 3), (False, 9)):
    cache = row.lean(trunk, jnp.array(member))
    np.testing.assert_array_equal(cache.length, [9])
    np.testing.assert_array_equal(cache.own_length, [own])
    np.testing.assert_array_equal(cache.positions(2), [[9, 10]])
    held = np.asarray(cache.keys[0][0, 0, :own, 0])
    np.testing.assert_allclose(held * 10, np.arange(9 - own, 9), atol=1e-4)
    longer = cache.extend(rows(1, 3, 7), jnp.array([2]))
    np.testing.assert_array_equal(longer.length, [11])
    np.testing.assert_array_equal(longer.keys[0][0, 0, own : own + 3, 0], 7)
    cut = longer.cut(0, 8, Pages(1, 3)).keys[0][0, 0, :, 0]
    np.testing.assert_allclose(cut, [0.8, 7, 7], atol=1e-5)
