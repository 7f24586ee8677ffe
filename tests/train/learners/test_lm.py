"""A small language model's distillation: its loss, its tables, its refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.config import ConfigError
from dflash_jax.drafters import LanguageModel
from tests.train.conftest import make_baseline, make_setup, train_steps
from tests.train.learners import oracle
from train.anchors import row_keys
from train.learners import lm
from train.learners.lm import LmLearner
from train.setup import Setup
from train.state import Batch

S, MOST = 101, 5  # tokens of a row, its documents
LOSS = {"loss": "ce + 0.5*kl", "slot_weights": "uniform"}
TOLERANCE = 2e-6  # relative; what is planted is off by a hundred times that


@pytest.fixture(scope="module")
def packed(model, corpus) -> Setup:
  """Several documents per row; the target's tables."""
  return make_setup(
    model,
    corpus,
    drafter=make_baseline("lm", model.target.config),
    packing=MOST,
    sequence_length=S,
    batch_size=3,
    **LOSS,
  )


@pytest.fixture(scope="module")
def params(packed):
  """Large enough that all of the text matters."""
  params = packed.trainer.learner.init(jax.random.key(1))
  return jax.tree.map(lambda x: x * 14 if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def batch(packed) -> Batch:
  """Of the first step, with what the target says of it."""
  batch = packed.train_batch(0)
  taps = jax.jit(packed.trainer.learner.taps)(packed.target_params, batch)
  return dataclasses.replace(batch, taps=taps)


def law(network, params, tokens):
  """log p after every token of one document, in float64."""
  padded = np.zeros((1, 48), np.int32)  # one program for all lengths
  padded[0, : len(tokens)] = tokens
  logits = _read(network, params, padded)[0, : len(tokens)]
  return oracle.log_softmax(np.asarray(logits, np.float64))


@functools.partial(jax.jit, static_argnums=0)
def _read(network, params, tokens):
  cache = network.init_cache(1, 0, "float32")
  hidden, _, _ = network.forward(params, tokens, cache)
  return network.logits(params, hidden)


@pytest.fixture(scope="module")
def expected(packed, params, batch) -> np.ndarray:
  """The loss, and over how many tokens."""
  drafter = packed.trainer.drafter
  bound = drafter.bind(params, packed.borrowed)
  loss = count = 0.0
  for row, numbers in enumerate(np.asarray(batch.documents)):
    for number in range(MOST):
      where = np.flatnonzero(numbers == number)
      if not where.size:
        continue
      tokens = np.asarray(batch.tokens[row, where])
      mask = np.asarray(batch.loss_mask[row, where])
      ours = law(drafter.network, bound, tokens)
      theirs = law(packed.trainer.target, packed.target_params, tokens)
      for place in range(len(tokens) - 1):
        if mask[place + 1]:
          p, q = theirs[place], ours[place]
          loss += 0.5 * (np.exp(p) * (p - q)).sum() - q[tokens[place + 1]]
          count += 1
  return np.array([loss / count, count])


def judge(packed, params, batch, kind=LmLearner):
  """The learner's loss, and over how many tokens."""
  settings = dict(packed.trainer.learner.settings) | {"loss_chunk": S * S}
  learner = kind(
    packed.trainer.target, packed.trainer.drafter, tuple(settings.items())
  )

  @jax.jit
  def run(params, target_params, borrowed, batch):
    blocks = learner.draw(row_keys(jax.random.key(0), jnp.arange(3)), batch)
    return learner.sums(params, target_params, borrowed, batch, blocks)

  sums = run(params, packed.target_params, packed.borrowed, batch)
  return np.array([sums.loss / sums.weight, sums.weight])


def test_every_token_of_the_answers_teaches_once(
  packed, params, batch, expected
):
  """All documents of packed rows, as if alone, in float64 numpy."""
  loss = judge(packed, params, batch)
  np.testing.assert_allclose(loss, expected, rtol=TOLERANCE)
  assert expected[1] == np.asarray(batch.loss_mask).sum()


class TaughtLate(LmLearner):
  """Takes the target's law after the label for the law of it."""

  def teach(self, target_params, last, blocks):
    late = dataclasses.replace(blocks, anchors=blocks.anchors + 1)
    return super().teach(target_params, last, late)


class SeesLabels(LmLearner):
  """Judges what follows the label."""

  def run(self, params, borrowed, context, blocks):
    anchors = jnp.minimum(blocks.anchors + 1, S - 1)
    late = dataclasses.replace(blocks, anchors=anchors)
    return super().run(params, borrowed, context, late)


@pytest.mark.parametrize(
  "planted", [TaughtLate, pytest.param(SeesLabels, marks=pytest.mark.slow)]
)
def test_a_planted_error_changes_the_loss(
  packed, params, batch, expected, planted
):
  loss = judge(packed, params, batch, planted)
  assert np.abs(loss / expected - 1).max() > 100 * TOLERANCE


def test_reading_another_document_changes_the_loss(
  packed, params, batch, expected, monkeypatch
):
  see_text = lm.see_text
  monkeypatch.setattr(
    lm, "see_text", lambda places, starts, S: see_text(places, 0 * starts, S)
  )
  loss = judge(packed, params, batch)
  assert np.abs(loss / expected - 1).max() > 100 * TOLERANCE


@pytest.mark.slow
def test_tables_of_its_own_are_tied_and_learn(model, corpus):
  """A width unlike the target's; the head is the embedding all along."""
  target = model.target.config
  network = dataclasses.replace(target, num_layers=1, width=14, tied_head=True)
  setup = make_setup(
    model,
    corpus,
    drafter=LanguageModel(network, 4),
    loss="ce",
    slot_weights="uniform",
  )
  assert setup.trainer.layers_read == () and setup.tap_scale() is None
  state, history = train_steps(setup, 40)
  assert set(state.params) == {"embedding", "layers", "norm"}
  own = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert own == setup.trainer.drafter.count_parameters()
  assert own > network.vocab_size * network.width
  assert history[-1]["loss"] < 0.8 * history[0]["loss"]
  bound = setup.trainer.learner.bind(state.drafter, setup.borrowed)
  np.testing.assert_array_equal(
    bound["head"]["kernel"], state.params["embedding"].T
  )


def test_borrowed_tables_are_no_parameters(packed, params):
  assert set(params) == {"layers", "norm"}
  drafter = packed.trainer.drafter
  own = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert own == drafter.count_parameters()
  bound = packed.trainer.learner.bind(params, packed.borrowed)
  assert bound["embedding"] is packed.borrowed.embedding
  assert bound["head"]["kernel"] is packed.borrowed.head


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"slot_weights": "dpace"}, "'dpace' weighs the slots of a block"),
    ({"slot_weights": "decay"}, "'decay' weighs .* use 'uniform'"),
    ({"loss": "ce + e2e"}, "'e2e', which judges whole blocks.* use 'tv'"),
    ({"loss": "ce + selector"}, "trains a selector, and the drafter has none"),
    ({"curriculum": 1.0}, "and the drafter corrects none"),
  ],
)
def test_a_loss_of_blocks_is_refused(model, corpus, settings, message):
  drafter = make_baseline("lm", model.target.config)
  settings = {"slot_weights": "uniform"} | settings
  with pytest.raises(ConfigError, match=message):
    make_setup(model, corpus, drafter=drafter, **settings)


def test_a_trimmed_head_is_refused(packed):
  with pytest.raises(ConfigError, match="draft_vocabulary=0"):
    packed.trainer.learner.init(jax.random.key(0), columns=7)
