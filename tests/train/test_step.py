"""The training step: its attention, what leaks, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dflash_jax.config import TrainConfig
from dflash_jax.drafters import DFlash
from tests.testing import (
  BLOCK_SIZE,
  random_params,
  tiny_drafter_config,
  tiny_target_config,
)
from tests.train import dense
from tests.train.conftest import copy, make_setup, train_steps
from train.anchors import cut_blocks, draw_anchors, every_anchor
from train.step import Batch, Trainer, fold_tap_scale, make_optimizer

S, A, K = 29, 7, BLOCK_SIZE
ANCHORS = np.array([[1, 5, 6, 11, 17, 19, 27], [2, 3, 4, 10, 13, 23, 26]])
ONE_LAYER = {"num_layers": 1, "layer_windows": (), "layer_causal": ()}
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32 sums in another order


@pytest.fixture(scope="module")
def world(setup):
  """Trainer, drafter parameters, two sequences and their taps."""
  return World(setup)


class World:
  """One batch, and drafts at fixed anchors of it."""

  def __init__(self, setup, **drafter):
    network = setup.trainer.drafter.config
    formulas = DFlash(dataclasses.replace(network, **drafter))
    self.trainer = dataclasses.replace(setup.trainer, drafter=formulas)
    self.target_params = setup.target_params
    self.params = random_params(formulas, 5)
    self.borrowed = setup.borrowed
    rng = np.random.default_rng(2)
    self.tokens = rng.integers(0, 94, (2, S)).astype(np.int32)
    self.taps = self.read(self.tokens)

  def read(self, tokens):
    """Taps of the target, brought to a size of about one."""
    batch = Batch(tokens, np.ones(tokens.shape, bool), None)
    run = jax.jit(Trainer.taps, static_argnums=0)
    return np.asarray(run(self.trainer, self.target_params, batch)) / 30

  def draft(self, tokens=None, taps=None):
    """f32[2, A, K - 1, D] at ANCHORS."""
    tokens = self.tokens if tokens is None else tokens
    valid = np.ones(ANCHORS.shape, bool)
    mask = np.ones(tokens.shape, bool)
    blocks = cut_blocks(tokens, mask, ANCHORS, valid, K)
    return _draft(
      self.trainer,
      self.params,
      self.borrowed,
      tokens,
      self.taps if taps is None else taps,
      blocks,
    )


_draft = jax.jit(Trainer._draft, static_argnums=0)


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
      world.trainer.drafter.config,
      jax.tree.map(doubles, world.params),
      doubles(world.borrowed.embedding),
      world.tokens[row],
      doubles(world.taps[row]),
      ANCHORS[row],
    )
    np.testing.assert_allclose(hidden[row], expected, **TOLERANCE)


def test_drafts_in_training_are_those_of_decoding(world):
  """Absorb the prefix, then draft: the same block at every anchor."""
  drafter = world.trainer.drafter
  trained = world.draft()

  @jax.jit
  def decode(tokens, taps, anchor):
    state = drafter.init_state(2, S, "float32")
    state = drafter.absorb(world.params, state, taps, tokens, anchor)
    first = jnp.take_along_axis(tokens, anchor[:, None], axis=1)[:, 0]
    size = jnp.full((2,), K)
    embedding = world.borrowed.embedding
    return drafter.draft(world.params, state, first, embedding, size)[:, 1:]

  for block in range(A):
    decoded = decode(world.tokens, world.taps, ANCHORS[:, block])
    np.testing.assert_allclose(trained[:, block], decoded, rtol=1e-5, atol=1e-5)


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


# --- Loss and gradients -------------------------------------------------------


def test_pieces_of_the_head_give_the_loss_and_gradient_of_the_whole(setup):
  world = World(setup, **ONE_LAYER)
  mask = np.ones((2, S), bool)
  mask[0, :4] = False
  anchors, valid = draw_anchors(jax.random.key(0), mask, A)
  blocks = cut_blocks(world.tokens, mask, anchors, valid, K)

  def run(size):
    settings = dataclasses.replace(world.trainer.config, loss_chunk=size)
    trainer = Trainer.create(
      world.trainer.target, world.trainer.drafter, settings
    )

    def loss(params):
      sums = trainer.block_sums(
        params, world.borrowed, world.tokens, world.taps, blocks
      )
      return sums.loss / sums.weight, sums

    return jax.jit(jax.grad(loss, has_aux=True))(world.params)

  gradient, sums = run(2 * A)
  assert float(sums.blocks) == 2 * A
  for size in (3, 7):
    pieces, piece_sums = run(size)
    for name in ("loss", "weight", "accepted", "blocks", "correct"):
      np.testing.assert_allclose(
        getattr(sums, name), getattr(piece_sums, name), rtol=1e-5
      )
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(
        x, y, rtol=1e-4, atol=1e-6 * float(jnp.abs(x).max())
      ),
      gradient,
      pieces,
    )


def test_only_the_drafters_own_parameters_train(setup):
  """The borrowed tables are no parameters, and an update leaves them be."""
  before = copy((setup.target_params, setup.borrowed))
  state, _ = train_steps(setup, 2)
  drafter = setup.trainer.drafter
  own = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert own == drafter.count_parameters()
  after = (setup.target_params, setup.borrowed)
  jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_step_depends_on_its_number_not_on_what_ran_before(setup):
  """Anchors and order of data are functions of (seed, step)."""
  state, _ = train_steps(setup, 3)
  args = (setup.target_params, setup.borrowed, setup.train_batch(3))
  twice = [setup.trainer.update(copy(state), *args)[1] for _ in range(2)]
  jax.tree.map(np.testing.assert_array_equal, *twice)
  later = dataclasses.replace(copy(state), step=jnp.int32(4))
  other = setup.trainer.update(later, *args)[1]
  assert float(other["loss"]) != float(twice[0]["loss"])


def test_the_loss_of_a_step_is_the_folded_drafters(setup):
  """With channels of unlike sizes, at the anchors that the step draws."""
  rng = np.random.default_rng(0)
  scale = setup.tap_scale() * rng.uniform(0.1, 10, 48)
  trainer = setup.trainer
  state = trainer.init_state(jax.random.key(1), scale)
  batch = setup.train_batch(0)
  key = jax.random.fold_in(jax.random.key(trainer.config.seed), 0)
  drawn = draw_anchors(key, batch.loss_mask, trainer.config.num_anchors)
  sums = jax.jit(trainer.block_sums)(
    fold_tap_scale(state.params, scale),
    setup.borrowed,
    batch.tokens,
    trainer.taps(setup.target_params, batch),
    cut_blocks(batch.tokens, batch.loss_mask, *drawn, K),
  )
  _, metrics = trainer.update(state, setup.target_params, setup.borrowed, batch)
  expected = float(sums.loss / sums.weight)
  assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
  assert float(metrics["slots"]) == float(sums.supervised.sum())


def test_training_learns_a_small_corpus_by_heart(trained):
  _, history = trained
  loss = [float(metrics["loss"]) for metrics in history]
  tau = [float(metrics["anchor_tau"]) for metrics in history]
  assert np.mean(loss[-10:]) < 0.25 * loss[0]
  assert np.mean(tau[:10]) < 1.2
  assert np.mean(tau[-10:]) > 2.0


# --- Soft labels --------------------------------------------------------------


@pytest.mark.parametrize("is_cached", [False, True])
def test_the_teacher_says_what_the_target_said_before_each_label(
  setup, is_cached
):
  """Its greedy answers are its own argmax: rows off by one would not match."""
  trainer = dataclasses.replace(
    setup.trainer,
    settings=tuple(
      sorted((dict(setup.trainer.settings) | {"teacher_share": 0.5}).items())
    ),
  )
  batch = setup.train_batch(0)
  if is_cached:
    states = trainer.taps(setup.target_params, batch)
    batch = dataclasses.replace(batch, taps=states.astype(jnp.float16))
  anchors, valid = draw_anchors(jax.random.key(0), batch.loss_mask, A)
  blocks = cut_blocks(batch.tokens, batch.loss_mask, anchors, valid, K)
  taps, hidden = trainer._split(setup.target_params, batch, blocks)
  said = trainer.target.logits(setup.target_params, hidden).argmax(-1)
  mask = np.asarray(blocks.mask)
  assert mask.sum() > 20
  np.testing.assert_array_equal(
    np.asarray(said)[mask], np.asarray(blocks.labels)[mask]
  )
  np.testing.assert_allclose(
    taps, setup.trainer.taps(setup.target_params, batch)[..., : taps.shape[-1]]
  )


def test_soft_labels_train_too(setup):
  trainer = dataclasses.replace(
    setup.trainer,
    settings=tuple(
      sorted((dict(setup.trainer.settings) | {"teacher_share": 1.0}).items())
    ),
  )
  _, history = train_steps(dataclasses.replace(setup, trainer=trainer), 60)
  loss = [float(metrics["loss"]) for metrics in history]
  # A teacher's own entropy stays: no loss goes below it.
  assert np.mean(loss[-5:]) < loss[0] - 0.4


# --- Tap scale ----------------------------------------------------------------


def test_folding_the_tap_scale_changes_how_features_are_written_only():
  formulas = DFlash(tiny_drafter_config(tiny_target_config()))
  params = random_params(formulas, 0)
  rng = np.random.default_rng(0)
  scale = rng.uniform(0.1, 10, 48).astype(np.float32)
  taps = rng.normal(size=(2, 3, 48)).astype(np.float32) / scale
  folded = fold_tap_scale(params, scale)
  np.testing.assert_allclose(
    formulas.context_features(folded, taps),
    formulas.context_features(params, taps * scale),
    rtol=1e-5,
    atol=1e-5,
  )
  del folded["context_projection"], params["context_projection"]
  assert jax.tree.all(jax.tree.map(lambda x, y: x is y, folded, params))


# --- Optimiser ----------------------------------------------------------------


def updates(steps: int, **config) -> list[dict[str, float]]:
  """Size of Adam's updates of a matrix and a norm, under gradients of one."""
  settings = TrainConfig(steps=steps, learning_rate=0.5, **config)
  optimizer = make_optimizer(settings)
  update = jax.jit(optimizer.update)
  params = {"matrix": jnp.ones((3, 5)), "norm": jnp.ones((5,))}
  state = optimizer.init(params)
  sizes = []
  for _ in range(steps):
    gradients = jax.tree.map(jnp.ones_like, params)
    change, state = update(gradients, state, params)
    sizes.append({k: -float(v.ravel()[0]) for k, v in change.items()})
  return sizes


def test_learning_rate_warms_up_and_follows_a_cosine():
  sizes = updates(20, warmup=0.2, final_learning_rate=0.1)
  rates = [size["matrix"] for size in sizes]
  assert rates[0] == 0.0
  np.testing.assert_allclose(rates[4], 0.5, rtol=1e-4)  # 0.2 * 20 steps
  np.testing.assert_allclose(rates[12], 0.5 * (0.1 + 0.9 / 2), rtol=1e-4)
  assert rates[19] < 0.5 * (0.1 + 0.9 * 0.02)


def test_weight_decay_leaves_norms_alone():
  plain, decayed = updates(3), updates(3, weight_decay=0.25)
  assert decayed[1]["norm"] == plain[1]["norm"]
  assert decayed[1]["matrix"] == pytest.approx(1.25 * plain[1]["matrix"])


def test_gradients_are_clipped_by_their_global_norm(setup):
  settings = dataclasses.replace(setup.trainer.config, clip_norm=1e-3)
  gradients = {"a": jnp.full((3,), 4.0), "b": jnp.full((1,), 2.0)}
  optimizer = make_optimizer(settings)
  _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
  moments = [s for s in jax.tree.leaves(state) if s.shape == (3,)]
  norm = float(optax.tree.norm(gradients))
  first_moment = (1 - settings.beta1) * 4.0 * 1e-3 / norm
  assert float(moments[0][0]) == pytest.approx(first_moment, rel=1e-4)


# --- Trimmed head -------------------------------------------------------------


def test_a_trimmed_head_is_right_where_it_has_the_label(model, corpus, trained):
  """A label that beats all others beats the fewer ones that are left."""
  state, _ = trained
  params = fold_tap_scale(state.params, state.tap_scale)
  ids = corpus.frequent_tokens(20, model.target.config.vocab_size)

  def matches(head_ids):
    setup = make_setup(model, corpus, head_ids)
    batch = setup.batch(corpus.train[:4])
    right, sums = setup.trainer.matches(
      params, setup.target_params, setup.borrowed, batch
    )
    return batch, np.asarray(right), sums

  batch, whole, whole_sums = matches(None)
  _, trimmed, sums = matches(ids)
  anchors, valid = every_anchor(batch.loss_mask)
  blocks = cut_blocks(batch.tokens, batch.loss_mask, anchors, valid, K)
  has_label = np.isin(blocks.labels, ids)
  assert (whole & ~has_label).any() and (trimmed & has_label).any()
  assert not (trimmed & ~has_label).any()
  assert not (whole & has_label & ~trimmed).any()
  np.testing.assert_array_equal(sums.supervised, whole_sums.supervised)
  np.testing.assert_array_equal(sums.correct, trimmed.sum(axis=(0, 1)))
