"""Packed rows: how they are filled, and that documents are as if alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing import SCALE
from tests.train.conftest import make_setup, train_steps
from train.anchors import (
  cut_blocks,
  document_starts,
  draw_anchors,
  every_anchor,
)
from train.packing import pack, read_packed, see_since
from train.setup import Setup
from train.state import Batch
from train.step import Trainer

S, K, MOST = 101, 4, 5  # tokens of a row, drafts, documents of a row


# --- Filling rows -------------------------------------------------------------


@pytest.mark.parametrize("most", [3, 1000])
def test_every_sequence_has_one_row_and_no_row_is_too_full(most):
  lengths = np.random.default_rng(0).integers(1, 150, 271)
  rows = pack(lengths, S, most)
  assert sorted(place for row in rows for place in row) == list(range(271))
  used = [sum(min(lengths[place], S) for place in row) for row in rows]
  assert max(used) <= S and min(map(len, rows)) > 0
  assert max(map(len, rows)) <= most
  if most > S:
    least = np.minimum(lengths, S).sum() / S
    assert len(rows) <= 11 / 9 * least + 4
    # Best fit: what is left of a row would take no later, shorter sequence.
    assert sum(S - u for u in used) / (S * len(rows)) < 0.05


def test_rows_are_filled_longest_first_into_the_tightest_space():
  lengths = np.array([3, 7, 4, 6, 5, 12, 1])
  rows = pack(lengths, 10, 9)
  assert rows == [(5,), (1, 0), (3, 2), (4, 6)]
  assert pack(lengths, 10, 1) == [(5,), (1,), (3,), (4,), (2,), (0,), (6,)]


def test_packed_batches_are_a_pure_function_of_seed_and_step(model, corpus):
  setup = make_setup(model, corpus, packing=MOST, sequence_length=S)
  other = make_setup(model, corpus, packing=MOST, sequence_length=S)
  seen = set()
  for step in (2, 0, 1):
    batch = setup.train_batch(step)
    jax.tree.map(np.testing.assert_array_equal, batch, other.train_batch(step))
    seen |= {row.tobytes() for row in np.asarray(batch.tokens)}
  assert len(seen) == len(setup.packed)  # three steps of four are an epoch
  assert len(setup.packed) < len(corpus.train)


# --- As if alone --------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(model, corpus) -> Setup:
  """Several answers per row, with a teacher."""
  parts = {"num_layers": 1, "layer_windows": (), "layer_causal": ()}
  return make_setup(
    model,
    corpus,
    parts=parts,
    packing=MOST,
    sequence_length=S,
    loss="ce + tv",
    batch_size=3,
  )


@pytest.fixture(scope="module")
def batch(packed) -> Batch:
  return packed.train_batch(0)


def members(batch: Batch) -> list[tuple[int, slice]]:
  """Row and place of each document."""
  documents = np.asarray(batch.documents)
  found = []
  for row, number in np.ndindex(len(documents), MOST):
    places = np.flatnonzero(documents[row] == number)
    if places.size:
      found.append((row, slice(places[0], places[-1] + 1)))
  assert len(found) > len(documents) + 2
  return found


def test_rows_hold_whole_sequences_side_by_side(packed, batch, corpus):
  tokens, mask = np.asarray(batch.tokens), np.asarray(batch.loss_mask)
  known = [tuple(x.tolist() for x in corpus.example(i)) for i in corpus.train]
  for row, place in members(batch):
    pair = tokens[row, place].tolist(), mask[row, place].tolist()
    assert pair in known
  padding = np.asarray(batch.documents) == MOST
  assert padding.any() and not mask[padding].any()


def test_starts_are_where_documents_start():
  documents = jnp.array([[0, 0, 0, 1, 1, 2, 7], [0, 7, 7, 7, 7, 7, 7]])
  starts = document_starts(documents)
  assert starts.tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
  assert not document_starts(jnp.zeros((2, 5), jnp.int32)).any()


def test_seen_bits_are_the_documents_own_past():
  rng = np.random.default_rng(0)
  documents = np.sort(rng.integers(0, 5, (3, 71)), axis=1)
  words = np.asarray(see_since(document_starts(jnp.asarray(documents))))
  assert words.shape == (3, 71, 3) and words.dtype == np.uint32
  for row, i, j in np.ndindex(3, 71, 71):
    bit = words[row, i, j // 32] >> (j % 32) & 1
    assert bit == (j <= i and documents[row, i] == documents[row, j])
  assert not (words[..., -1] >> 7).any()  # past the last row


def test_the_target_reads_packed_documents_as_if_alone(packed, batch):
  starts = document_starts(batch.documents)
  taps = read_packed(
    packed.trainer.target, packed.target_params, batch.tokens, starts, (0, 2)
  )
  read = jax.jit(unpacked(packed).learner.taps)
  for row, place in members(batch):
    expected = read(packed.target_params, extract(batch, row, place))
    length = place.stop - place.start
    np.testing.assert_allclose(
      taps[row, place], expected[0, :length, :48], rtol=1e-4, atol=1e-4
    )


def extract(batch: Batch, row: int, place: slice) -> Batch:
  """One document in a row of its own, padded."""
  width = ((0, 0), (0, 47 - (place.stop - place.start)))
  return Batch(
    jnp.pad(batch.tokens[row, place][None], width),
    jnp.pad(batch.loss_mask[row, place][None], width),
    jnp.zeros((1, 47), jnp.int32),
  )


def unpacked(setup: Setup) -> Trainer:
  trainer = setup.trainer
  config = dataclasses.replace(trainer.config, packing=0)
  return Trainer.create(trainer.target, trainer.drafter, config)


def test_anchors_are_budgeted_by_document(batch):
  mask, documents = batch.loss_mask, batch.documents
  budget = 5
  keys = jax.random.split(jax.random.key(0), 3)
  anchors, valid = draw_anchors(keys, mask, budget, documents, MOST)
  assert anchors.shape == (3, budget * MOST)
  allowed = np.asarray(every_anchor(mask, documents)[1])
  for row, place in members(batch):
    inside = (anchors[row] >= place.start) & (anchors[row] < place.stop)
    drawn = np.asarray(anchors[row])[np.asarray(inside & valid[row])]
    assert len(drawn) == min(budget, allowed[row, place].sum())
    assert len(set(drawn.tolist())) == len(drawn)
    assert allowed[row][drawn].all()
  for row in range(3):
    chosen = np.asarray(anchors[row])[np.asarray(valid[row])]
    assert (np.diff(chosen) > 0).all()


def test_labels_never_cross_documents():
  """Even where a document is supervised from its first token on."""
  tokens = np.arange(10, 18, dtype=np.int32)[None]
  documents = np.array([[0, 0, 0, 1, 1, 1, 1, 2]])
  mask = np.ones((1, 8), bool)
  anchors, valid = every_anchor(jnp.asarray(mask), jnp.asarray(documents))
  assert valid[0].tolist() == [1, 1, 0, 1, 1, 1, 0, 0]
  blocks = cut_blocks(tokens, mask, anchors, valid, K, documents)
  lengths = blocks.mask[0].sum(-1)
  assert lengths.tolist() == [2, 1, 0, 3, 2, 1, 0, 0]
  assert blocks.starts[0].tolist() == [0, 0, 0, 3, 3, 3, 3, 7]


def test_packed_sums_are_those_of_the_documents_alone(packed, batch):
  """Same anchors, same labels: loss, weights, counts, tau."""
  state = packed.trainer.init_state(jax.random.key(1), packed.tap_scale())
  params = jax.tree.map(  # large enough that all of the context matters
    lambda x: x * SCALE if x.ndim > 1 else x, state.drafter
  )
  keys = jax.random.split(jax.random.key(0), 3)
  blocks = packed.trainer.learner.draw(keys, batch)
  tables = (packed.target_params, packed.borrowed)

  @functools.partial(jax.jit, static_argnums=0)
  def run(trainer, batch, blocks):
    return trainer.learner.sums(params, *tables, batch, blocks)

  together = run(packed.trainer, batch, blocks)
  apart = []
  for row, place in members(batch):
    alone = extract(batch, row, place)
    anchors = np.asarray(blocks.anchors[row])
    mine = (anchors >= place.start) & (anchors < place.stop)
    mine &= np.asarray(blocks.mask[row].any(-1))
    chosen = np.resize(anchors[mine] - place.start, 7)[None]
    valid = (np.arange(7) < mine.sum())[None]
    lone = unpacked(packed).learner.cut(alone, jnp.asarray(chosen), valid, K)
    apart.append(run(unpacked(packed), alone, lone))
  total = jax.tree.map(lambda *parts: sum(parts), *apart)
  assert float(together.blocks) > 20
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5), together, total
  )


def test_training_on_packed_rows_learns(packed):
  _, history = train_steps(packed, 50)
  assert history[-1]["loss"] < 0.7 * history[0]["loss"]
