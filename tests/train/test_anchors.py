"""Anchors, labels and supervision against cases written by hand and loops."""

import jax
import jax.numpy as jnp
import numpy as np

from train.anchors import cut_blocks, draw_anchors, every_anchor, row_keys

B, S, K = 3, 23, 5


def random_mask(seed: int) -> np.ndarray:
  """Answers with gaps, as in a conversation of several turns."""
  rng = np.random.default_rng(seed)
  return rng.random((B, S)) < 0.7


def candidates(mask: np.ndarray) -> list[int]:
  """Positions whose successor is supervised as they are, by a loop."""
  return [a for a in range(len(mask) - 1) if mask[a] and mask[a + 1]]


def alone(mask: np.ndarray) -> np.ndarray:
  """One document per row."""
  return np.zeros(mask.shape, np.int32)


def draw(mask, num_anchors, seed=0):
  keys = row_keys(jax.random.key(seed), jnp.arange(len(mask)))
  drawn = draw_anchors(keys, jnp.asarray(mask), num_anchors, alone(mask))
  return map(np.asarray, drawn)


def test_all_candidates_are_taken_when_there_are_fewer_than_anchors():
  mask = np.array(
    [
      [0, 0, 1, 1, 1, 0, 0],
      [0, 1, 0, 1, 0, 1, 1],
      [1, 1, 1, 1, 1, 1, 1],
      [0, 0, 0, 0, 0, 0, 0],
    ],
    bool,
  )
  anchors, valid = draw(mask, 4)
  assert anchors[0].tolist() == [2, 3, 0, 0]
  assert valid[0].tolist() == [True, True, False, False]
  assert anchors[1].tolist() == [5, 0, 0, 0]
  assert valid[1].tolist() == [True, False, False, False]
  assert set(anchors[2]) <= set(range(6)) and valid[2].all()
  assert not valid[3].any()


def test_drawn_anchors_are_sorted_candidates_without_repeats():
  for seed in range(20):
    mask = random_mask(seed)
    anchors, valid = draw(mask, 6, seed)
    for row in range(B):
      chosen = anchors[row][valid[row]].tolist()
      allowed = candidates(mask[row])
      assert chosen == sorted(set(chosen))
      assert set(chosen) <= set(allowed)
      assert len(chosen) == min(6, len(allowed))


def test_every_candidate_is_drawn_equally_often():
  mask = np.array([[0, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1]], bool)
  allowed = candidates(mask[0])
  keys = jax.random.split(jax.random.key(0), 3000)
  anchors, valid = jax.vmap(
    lambda key: draw_anchors(key[None], mask, 2, alone(mask))
  )(keys)
  assert np.asarray(valid).all()
  counts = np.bincount(np.asarray(anchors).ravel(), minlength=12)
  assert counts.sum() == counts[allowed].sum()
  # Expected 1200 each, standard deviation 27.
  assert abs(counts[allowed] - 1200).max() < 5 * 27


def test_anchors_are_redrawn_with_the_key_alone():
  mask = np.ones((B, S), bool)
  first, _ = draw(mask, 6, seed=1)
  again, _ = draw(mask, 6, seed=1)
  other, _ = draw(mask, 6, seed=2)
  np.testing.assert_array_equal(first, again)
  assert (first != other).any()
  assert (first[0] != first[1]).any()  # rows are drawn apart


def test_a_row_draws_the_same_whoever_it_is_with():
  """By its number in the whole batch, so that devices may share it."""
  mask, key = random_mask(0), jax.random.key(3)
  together, _ = draw(mask, 6, seed=3)
  for row in range(B):
    lone = mask[row : row + 1]
    keys = row_keys(key, jnp.array([row]))
    anchors, _ = draw_anchors(keys, jnp.asarray(lone), 6, alone(lone))
    np.testing.assert_array_equal(anchors[0], together[row])


def test_more_anchors_than_positions_leave_invalid_blocks():
  anchors, valid = draw(np.ones((1, 4), bool), 9)
  assert anchors.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0, 0]]
  assert valid.sum() == 3


def test_labels_and_supervision_equal_a_loop():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 1000, (B, S), dtype=np.int32)
  for seed in range(5):
    mask = random_mask(seed)
    anchors, valid = draw(mask, 7, seed)
    blocks = cut_blocks(tokens, mask, anchors, valid, K - 1, alone(mask))
    for row, block in np.ndindex(B, 7):
      anchor, runs = anchors[row, block], bool(valid[row, block])
      for slot in range(1, K):
        position = anchor + slot
        runs = runs and position < S and mask[row, position]
        assert blocks.mask[row, block, slot - 1] == runs
        if runs:
          assert blocks.labels[row, block, slot - 1] == tokens[row, position]
          before = tokens[row, position - 1]
          assert blocks.previous[row, block, slot - 1] == before


def test_supervision_stops_at_the_first_gap_and_at_the_end():
  mask = np.array([[1, 1, 1, 0, 1, 1, 1, 1]], bool)
  tokens = np.arange(10, 18, dtype=np.int32)[None]
  anchors = np.array([[0, 5, 6]])
  blocks = cut_blocks(
    tokens, mask, anchors, np.ones((1, 3), bool), K - 1, alone(mask)
  )
  assert blocks.labels[0, 0].tolist() == [11, 12, 13, 14]
  assert blocks.mask[0].astype(int).tolist() == [
    [1, 1, 0, 0],  # the gap at 3 ends it, though 4 is supervised
    [1, 1, 0, 0],  # 8 and 9 do not exist
    [1, 0, 0, 0],
  ]


def test_every_anchor_is_the_whole_candidate_set():
  mask = random_mask(3)
  anchors, valid = every_anchor(jnp.asarray(mask), alone(mask))
  for row in range(B):
    assert np.flatnonzero(valid[row]).tolist() == candidates(mask[row])
    assert anchors[row].tolist() == list(range(S))
