"""The step: its loss in pieces, its teacher, and that every variant learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.config import ConfigError
from dflash_jax.drafters import DFlash
from dflash_jax.networks import Confidence, Convolution, Gru, Markov
from tests.testing import (
  BLOCK_SIZE,
  random_params,
  tiny_drafter_config,
  tiny_target_config,
)
from tests.train.conftest import copy, make_setup, train_steps
from train.anchors import cut_blocks, every_anchor, row_keys
from train.setup import Setup
from train.state import fold_tap_scale
from train.step import Trainer
from train.sums import summarize

A, K = 7, BLOCK_SIZE
ONE_LAYER = {"num_layers": 1, "layer_windows": (), "layer_causal": ()}
DSPARK = {
  "anchor_predicts": True,
  "markov": Markov(5, "gated"),
  "confidence": Confidence(),
}


def change(setup: Setup, **settings) -> Setup:
  """The same with other settings."""
  trainer = setup.trainer
  config = dataclasses.replace(trainer.config, **settings)
  trainer = Trainer.create(trainer.target, trainer.drafter, config)
  return dataclasses.replace(setup, trainer=trainer)


def close(x, y, rtol: float = 1e-4) -> None:
  """Equal trees, up to sums in another order."""
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=rtol, atol=1e-6 * max(float(jnp.abs(x).max()), 1.0)
    ),
    x,
    y,
  )


# --- Loss and gradients -------------------------------------------------------


@pytest.fixture(scope="module")
def rich(model, corpus) -> Setup:
  """A drafter with a part of each kind, and a teacher."""
  parts = {"convolution": Convolution(2, 4)} | ONE_LAYER | DSPARK
  loss = "0.3*ce + lk + e2e + confidence"
  return make_setup(model, corpus, parts=parts, loss=loss)


def gradients(setup: Setup, batch, state=None):
  """Gradients and sums of a fresh drafter's first step."""
  trainer = setup.trainer
  if state is None:
    state = trainer.init_state(jax.random.key(1), setup.tap_scale())
    noise = iter(jax.random.split(jax.random.key(2), 99))
    params = jax.tree.map(
      lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), state.params
    )
    state = dataclasses.replace(state, params=params)
  run = jax.jit(Trainer.gradients, static_argnums=0)
  return run(trainer, state, setup.target_params, setup.borrowed, batch)


def test_pieces_of_the_head_and_of_the_batch_give_the_whole(rich):
  """Chunks of blocks, and accumulation over rows: sums, not means of means."""
  batch = rich.train_batch(0)
  whole = gradients(change(rich, loss_chunk=4 * A), batch)
  assert float(whole[1].blocks) > 20
  assert len({int(x) for x in np.asarray(batch.loss_mask).sum(1)}) > 1
  for settings in (
    {"loss_chunk": 11, "anchor_chunk": 3},
    {"loss_chunk": 4 * A, "accumulate": 2},
  ):
    close(whole, gradients(change(rich, **settings), batch))


def test_a_gradient_is_that_of_the_weighted_mean(rich):
  """Of sum(w cost) / sum(w), by central differences along random directions."""
  setup = change(rich, loss="0.3*ce + e2e + confidence", slot_weights="uniform")
  batch, trainer = setup.train_batch(0), setup.trainer
  state = trainer.init_state(jax.random.key(1), setup.tap_scale())
  gradient, _ = gradients(setup, batch, state)
  rng = np.random.default_rng(0)
  way = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), gradient
  )

  def loss(step):
    params = jax.tree.map(lambda x, d: x + step * d, state.params, way)
    moved = dataclasses.replace(state, params=params)
    sums = gradients(setup, batch, moved)[1]
    return float(sums.loss) / float(sums.weight)

  slope = sum(
    float((g * d).sum())
    for g, d in zip(*map(jax.tree.leaves, (gradient, way)), strict=True)
  )
  step = 2e-4
  # The confidence's own aim moves with the law, and its gradient does not.
  assert (loss(step) - loss(-step)) / (2 * step) == pytest.approx(
    slope, rel=0.05
  )


def test_every_part_of_a_drafter_learns(rich):
  """No parameter is left without a gradient, the frozen tables apart."""
  gradient, _ = gradients(rich, rich.train_batch(0))
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.asarray(leaf).any(), jax.tree_util.keystr(path)


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
  twice = [setup.trainer.update(copy(state), *args)[1:] for _ in range(2)]
  jax.tree.map(np.testing.assert_array_equal, *twice)
  later = dataclasses.replace(copy(state), step=jnp.int32(4))
  other = setup.trainer.update(later, *args)[1]
  assert float(other.loss) != float(twice[0][0].loss)


def test_the_loss_of_a_step_is_the_folded_drafters(setup):
  """With channels of unlike sizes, at the anchors that the step draws."""
  rng = np.random.default_rng(0)
  scale = setup.tap_scale() * rng.uniform(0.1, 10, 48)
  trainer = setup.trainer
  state = trainer.init_state(jax.random.key(1), scale)
  batch = setup.train_batch(0)
  key = jax.random.fold_in(jax.random.key(trainer.config.seed), 0)
  expected = jax.jit(trainer.learner.sums)(
    fold_tap_scale(state.params, scale),
    setup.target_params,
    setup.borrowed,
    batch,
    trainer.learner.draw(row_keys(key, jnp.arange(4)), batch),
  )
  arguments = (setup.target_params, setup.borrowed, batch)
  _, sums, _ = trainer.update(state, *arguments)
  close(sums, expected, rtol=1e-5)
  assert float(summarize(sums)["slots"]) == float(expected.supervised.sum())


def test_training_learns_a_small_corpus_by_heart(trained):
  _, history = trained
  loss = [float(metrics["loss"]) for metrics in history]
  tau = [float(metrics["anchor_tau"]) for metrics in history]
  assert np.mean(loss[-10:]) < 0.25 * loss[0]
  assert np.mean(tau[:10]) < 1.2
  assert np.mean(tau[-10:]) > 2.0


def test_a_curriculum_begins_with_the_slots_own_logits(model, corpus):
  parts = {"gru": Gru(11, 7)} | ONE_LAYER
  setup = make_setup(model, corpus, parts=parts, steps=10, curriculum=0.5)
  state = setup.trainer.init_state(jax.random.key(1), setup.tap_scale())
  batch = setup.train_batch(0)
  for step, share in ((0, 1.0), (3, 0.4), (5, 0.0)):
    now = dataclasses.replace(state, step=jnp.int32(step))
    gradient, _ = gradients(setup, batch, now)
    learns = np.asarray(gradient["corrector"]["widen"]["kernel"]).any()
    assert learns == (share < 1)


# --- The teacher --------------------------------------------------------------


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("anchor_predicts", [False, True])
def test_the_teacher_says_what_the_target_said_before_each_label(
  model, corpus, is_cached, anchor_predicts
):
  """Its greedy answers are its own argmax: rows off by one would not match."""
  parts = {"anchor_predicts": anchor_predicts}
  setup = make_setup(model, corpus, parts=parts, loss="kl")
  learner, batch = setup.trainer.learner, setup.train_batch(0)
  if is_cached:
    states = learner.taps(setup.target_params, batch)
    batch = dataclasses.replace(batch, taps=states.astype(jnp.float16))
  keys = jax.random.split(jax.random.key(0), 4)
  blocks = learner.draw(keys, batch)
  taps, last = learner.split(setup.target_params, batch)
  hidden = learner.teach(setup.target_params, last, blocks)
  said = learner.target.logits(setup.target_params, hidden).argmax(-1)
  mask = np.asarray(blocks.mask)
  assert mask.sum() > 20 and mask.shape[-1] == K - 1 + anchor_predicts
  np.testing.assert_array_equal(
    np.asarray(said)[mask], np.asarray(blocks.labels)[mask]
  )
  plain = make_setup(model, corpus, parts=parts).trainer.learner
  np.testing.assert_allclose(
    taps, plain.taps(setup.target_params, batch)[..., : taps.shape[-1]]
  )


def test_a_loss_without_teacher_reads_no_more_than_the_taps(setup):
  taps = setup.trainer.drafter.taps
  assert setup.trainer.layers_read == taps
  assert change(setup, loss="ce + tv").trainer.layers_read == (*taps, 2)


def test_soft_labels_train_too(setup):
  _, history = train_steps(change(setup, loss="kl"), 60)
  loss = [float(metrics["loss"]) for metrics in history]
  assert np.mean(loss[-5:]) < loss[0] - 0.4
  assert history[-1]["tau_tv"] > history[0]["tau_tv"] + 0.2


def test_a_loss_that_the_drafter_cannot_have_is_refused(setup):
  with pytest.raises(ConfigError, match="trains a selector, and the drafter"):
    change(setup, loss="ce + selector")


# --- Averaged weights ---------------------------------------------------------


def test_an_average_follows_the_weights_and_is_what_decodes(setup):
  averaged = change(setup, ema=0.75)
  state, _ = train_steps(averaged, 1)
  first = copy(state.average)
  start = averaged.trainer.init_state(jax.random.key(1), setup.tap_scale())
  mix = jax.tree.map(
    lambda x, y: 0.75 * x + 0.25 * y, start.params, state.params
  )
  close(first, mix)
  second, _ = train_steps(averaged, 2)
  mix = jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, first, second.params)
  close(second.average, mix)
  close(second.drafter, fold_tap_scale(mix, second.tap_scale))
  plain, _ = train_steps(setup, 2)
  close(plain.params, second.params)
  assert plain.average is None
  close(plain.drafter, fold_tap_scale(plain.params, plain.tap_scale))


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
  anchors, valid = every_anchor(batch.loss_mask, batch.documents)
  blocks = cut_blocks(
    batch.tokens, batch.loss_mask, anchors, valid, K - 1, batch.documents
  )
  has_label = np.isin(blocks.labels, ids)
  assert (whole & ~has_label).any() and (trimmed & has_label).any()
  assert not (trimmed & ~has_label).any()
  assert not (whole & has_label & ~trimmed).any()
  np.testing.assert_array_equal(sums.supervised, whole_sums.supervised)
  np.testing.assert_array_equal(sums.right.correct, trimmed.sum(axis=(0, 1)))


def test_matches_are_the_same_however_many_anchors_run_at_once(rich):
  state = rich.trainer.init_state(jax.random.key(1), rich.tap_scale())
  arguments = (rich.target_params, rich.borrowed, rich.batch([1, 4, 6]))
  whole, sums = change(rich, num_anchors=47).trainer.matches(
    state.drafter, *arguments
  )
  assert whole.shape == (3, 47, K)
  few = change(rich, num_anchors=11, batch_size=3)
  pieces, piece_sums = few.trainer.matches(state.drafter, *arguments)
  np.testing.assert_array_equal(whole, pieces)
  close(sums, piece_sums)
