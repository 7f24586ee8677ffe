"""Training blocks: their attention, what leaks, and that decoding agrees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.drafters import DFlash
from dflash_jax.model import borrow
from dflash_jax.proposal import Drafting, Moment
from tests.testing import BLOCK_SIZE, VARIANTS
from tests.train import dense
from train.drafts import (
  Drafts,
  find_columns,
  read_context,
  read_drafts,
  run_blocks,
)
from train.losses import is_best, take
from train.state import Batch

S, A, K = 29, 7, BLOCK_SIZE
ONE_LAYER = {"num_layers": 1, "layer_windows": (), "layer_causal": ()}
ANCHORS = np.array([[1, 5, 6, 11, 17, 19, 27], [2, 3, 4, 10, 13, 23, 26]])
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32 sums in another order


@pytest.fixture(scope="module")
def world(setup):
  """Learner, drafter parameters, two sequences and their taps."""
  return World(setup)


def whole(tokens: np.ndarray) -> Batch:
  """Rows that are supervised from end to end."""
  shape = tokens.shape
  return Batch(tokens, np.ones(shape, bool), np.zeros(shape, np.int32))


def busy_params(drafter: DFlash, columns: int):
  """Random parameters in which every part has a say, and none drowns others."""
  params = drafter.init(jax.random.key(5), "float32", columns)
  keys = iter(jax.random.split(jax.random.key(6), 99))

  def stir(path, leaf):
    size = 1.0 if "corrector" in jax.tree_util.keystr(path) else 0.3
    noise = size * jax.random.normal(next(keys), leaf.shape)
    return leaf + noise if leaf.ndim > 1 else leaf

  return jax.tree_util.tree_map_with_path(stir, params)


class World:
  """One batch, and drafts at fixed anchors of it."""

  def __init__(self, setup, head_ids=None, **drafter):
    network = setup.trainer.drafter.config
    formulas = DFlash(dataclasses.replace(network, **drafter))
    self.learner = dataclasses.replace(setup.trainer.learner, drafter=formulas)
    self.target_params = setup.target_params
    self.borrowed = borrow(setup.target_params, head_ids)
    self.params = busy_params(formulas, self.borrowed.head.shape[-1])
    rng = np.random.default_rng(2)
    self.tokens = rng.integers(0, 94, (2, S)).astype(np.int32)
    self.taps = self.read(self.tokens)

  def read(self, tokens):
    """Taps of the target, brought to a size of about one."""
    batch = whole(tokens)
    run = jax.jit(self.learner.taps)
    return np.asarray(run(self.target_params, batch)) / 30

  def draft(self, tokens=None, taps=None):
    """f32[2, A, K - 1, D] at ANCHORS."""
    tokens = self.tokens if tokens is None else tokens
    taps = self.taps if taps is None else taps
    return _draft(
      self.learner, self.params, self.borrowed.embedding, whole(tokens), taps
    )


@functools.partial(jax.jit, static_argnums=0)
def _draft(learner, params, embedding, batch, taps):
  drafter, documents = learner.drafter, batch.documents
  valid = np.ones(ANCHORS.shape, bool)
  blocks = learner.cut(batch, ANCHORS, valid, learner.slots)
  context = read_context(drafter, params, taps, documents, "float32")
  return run_blocks(drafter, params, embedding, context, blocks)


# --- Attention ----------------------------------------------------------------


@pytest.mark.parametrize(
  "drafter",
  [
    {},
    {"layer_windows": (7, 0), "layer_causal": (True, False)},
    {"layer_windows": (3, 5)},
  ],
  ids=["full", "causal and window", "narrow windows"],
)
def test_two_part_attention_equals_one_dense_mask(setup, drafter):
  world = World(setup, **drafter)
  hidden = world.draft()
  doubles = functools.partial(np.asarray, dtype=np.float64)
  for row in range(2):
    expected = dense.draft(
      world.learner.drafter.config,
      jax.tree.map(doubles, world.params),
      doubles(world.borrowed.embedding),
      world.tokens[row],
      doubles(world.taps[row]),
      ANCHORS[row],
    )
    np.testing.assert_allclose(hidden[row], expected, **TOLERANCE)


@pytest.mark.parametrize(
  ("name", "is_trimmed"),
  [(name, False) for name in ("dflash", *VARIANTS)]
  + [("dflash2", True), ("dspark gated", True), ("domino", True)],
)
def test_drafts_in_training_are_those_of_decoding(setup, name, is_trimmed):
  """Absorb the prefix and draft; then train on what was drafted.

  Teacher-forced by its own greedy drafts the step must be right at every slot
  of a block, with the confidence that the proposal states.
  """
  ids = np.arange(0, setup.trainer.drafter.config.vocab_size, 3)
  parts = ONE_LAYER | VARIANTS.get(name, {})
  world = World(setup, ids if is_trimmed else None, **parts)
  learner, drafter = world.learner, world.learner.drafter
  P = drafter.max_drafts

  @jax.jit
  def draft(anchor):
    state = drafter.init_state(2, S, "float32")
    state = drafter.absorb(
      world.params, state, world.taps, world.tokens, anchor
    )
    first = jnp.take_along_axis(world.tokens, anchor[:, None], axis=1)[:, 0]
    moment = Moment(jnp.zeros(2, jnp.uint32), anchor)
    return drafter.propose(
      world.params,
      state,
      first,
      world.borrowed,
      Drafting(P),
      moment,
      jnp.full(2, 99),
    )

  @jax.jit
  def train(tokens, anchor):
    batch = whole(tokens)
    blocks = learner.cut(batch, anchor[:, None], np.ones((2, 1), bool), P)
    context = read_context(
      drafter, world.params, world.taps, batch.documents, "float32"
    )
    tables = (world.borrowed.embedding, world.borrowed.head)
    hidden = run_blocks(drafter, world.params, tables[0], context, blocks)
    columns = find_columns(blocks.labels, world.borrowed)
    return columns[:, 0], read_drafts(
      drafter,
      world.params,
      *tables,
      hidden[:, 0],
      blocks.previous[:, 0],
      columns[:, 0],
    )

  drafted = set()
  for block in range(A - 1):  # of the last the row's end cuts some slots off
    anchor = ANCHORS[:, block]
    proposal = jax.device_get(draft(anchor))
    tokens = world.tokens.copy()
    for row in range(2):
      tokens[row, anchor[row] + 1 :][:P] = proposal.tokens[row]
    columns, drafts = train(tokens, anchor)
    assert drafts.is_right(columns).all()
    others = drafts.is_right((columns + 1) % drafts.plain.shape[-1])
    assert not others.any()
    np.testing.assert_allclose(
      _confidence(drafts, columns), proposal.confidence, rtol=1e-4, atol=1e-6
    )
    drafted |= set(np.ravel(proposal.tokens).tolist())
    if drafter.reads_drafts:
      corrected = ~is_best(drafts.plain, columns)
      drafted |= {"corrected"} if corrected.any() else set()
  assert len(drafted) > 6
  assert ("corrected" in drafted) == drafter.reads_drafts


def _confidence(drafts: Drafts, columns: jax.Array) -> jax.Array:
  """What decoding would state: its head's chance, or its law's."""
  if drafts.odds is not None:
    return jax.nn.sigmoid(drafts.odds)
  if drafts.choice is not None:
    return jax.nn.softmax(drafts.choice.scores).max(-1)
  return jnp.exp(take(jax.nn.log_softmax(drafts.law), columns))


def test_a_slot_is_corrected_by_the_token_before_it_alone(setup):
  """Of a Markov head; a GRU's correction knows all tokens before."""
  hidden = jax.random.normal(jax.random.key(0), (1, K, 24))
  before = np.array([[3, 1, 4, 15, 9]])
  for name, reach in (("dspark", 1), ("dspark rnn", K), ("domino shifted", K)):
    world = World(setup, **ONE_LAYER, **VARIANTS[name])

    @jax.jit
    def law(previous, world=world):
      embedding, head = world.borrowed.embedding, world.borrowed.head
      labels = jnp.zeros_like(previous)
      return read_drafts(
        world.learner.drafter,
        world.params,
        embedding,
        head,
        hidden,
        previous,
        labels,
      ).law

    other = before.copy()
    other[0, 2] = 26
    changed = (law(before) != law(other)).any(-1)[0]
    assert changed.tolist() == [2 <= k < 2 + reach for k in range(K)], name


# --- Leaks --------------------------------------------------------------------


def changed_blocks(world, **inputs) -> list[int]:
  """Anchors of row 0 whose drafts differ from the unchanged batch's."""
  same = np.isclose(world.draft(), world.draft(**inputs), atol=1e-5)
  assert same[1].all()  # the other row is not touched
  return ANCHORS[0][~same[0].all(axis=(1, 2))].tolist()


def test_features_from_the_anchor_on_are_not_seen(world):
  for anchor in (6, 17):
    taps = world.taps.copy()
    taps[0, anchor:] += 1.0
    unseen = [a for a in ANCHORS[0] if a <= anchor]
    seen = [a for a in ANCHORS[0] if a > anchor]
    assert changed_blocks(world, taps=taps) == seen
    assert unseen and seen


def test_the_feature_just_before_the_anchor_is_seen(world):
  taps = world.taps.copy()
  taps[0, 10] += 1.0
  assert changed_blocks(world, taps=taps) == [11, 17, 19, 27]


def test_tokens_after_the_anchor_are_not_seen(world):
  """Through the target as well: its features are computed anew."""
  tokens = world.tokens.copy()
  tokens[0, 12:] = (tokens[0, 12:] + 1) % 94
  changed = changed_blocks(world, tokens=tokens, taps=world.read(tokens))
  assert changed == [17, 19, 27]  # 11 sees token 11, but none later


def test_the_anchor_and_the_token_before_it_are_seen(world):
  for position, expected in ((11, [11, 17, 19, 27]), (10, [11, 17, 19, 27])):
    tokens = world.tokens.copy()
    tokens[0, position] = (tokens[0, position] + 1) % 94
    changed = changed_blocks(world, tokens=tokens, taps=world.read(tokens))
    assert changed == expected
