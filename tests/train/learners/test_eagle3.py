"""EAGLE-3's training-time test: its loss, what leaks, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.config import ConfigError
from dflash_jax.drafters.nodes import gather
from dflash_jax.proposal import Drafting, Moment
from tests.testing import BLOCK_SIZE
from tests.train.conftest import ANSWER_TOKENS, make_baseline, make_setup
from tests.train.learners import oracle
from train.anchors import row_keys
from train.learners.base import see_text
from train.learners.eagle3 import Eagle3Learner
from train.setup import Setup
from train.state import Batch

S, MOST, STEPS = 101, 5, 3  # tokens of a row, its documents, unrolled steps
IDS = np.arange(1, 263, 3)  # a draft vocabulary that lacks two thirds
LOSS = {"loss": "kl", "slot_weights": "decay", "unroll_steps": STEPS}
TOLERANCE = 2e-6  # relative; what is planted is off by a hundred times that


@pytest.fixture(scope="module")
def packed(model, corpus) -> Setup:
  """Several documents per row, and a head that lacks some answers' tokens."""
  ids = np.union1d(IDS, corpus.frequent_tokens(30, 263)).astype(np.int32)
  return make_setup(
    model,
    corpus,
    ids,
    drafter=make_baseline("eagle3", model.target.config, len(ids)),
    packing=MOST,
    sequence_length=S,
    batch_size=3,
    **LOSS,
  )


@pytest.fixture(scope="module")
def params(packed):
  """Large enough that every part has a say."""
  state = packed.trainer.init_state(
    jax.random.key(1), packed.tap_scale(), len(packed.head_ids)
  )
  return jax.tree.map(lambda x: x * 14 if x.ndim > 1 else x, state.drafter)


@pytest.fixture(scope="module")
def batch(packed) -> Batch:
  """Of the first step, with what the target says of it."""
  batch = packed.train_batch(0)
  taps = jax.jit(packed.trainer.learner.taps)(packed.target_params, batch)
  return dataclasses.replace(batch, taps=taps)


def documents(batch: Batch):
  """Tokens and loss mask of each document of a batch."""
  for row, numbers in enumerate(np.asarray(batch.documents)):
    for number in range(MOST):
      places = np.flatnonzero(numbers == number)
      if places.size:
        where = (row, slice(places[0], places[-1] + 1))
        yield (
          np.asarray(batch.tokens[where]),
          np.asarray(batch.loss_mask[where]),
        )


def read(target, params, tokens):
  """Taps of layers 0 and 2, and logits, of one document, in float64."""
  padded = np.zeros((1, 48), np.int32)  # one program for all lengths
  padded[0, : len(tokens)] = tokens
  pair = _read(target, params, padded)
  return (np.asarray(x[0, : len(tokens)], np.float64) for x in pair)


@functools.partial(jax.jit, static_argnums=0)
def _read(target, params, tokens):
  cache = target.init_cache(1, 0, "float32")
  hidden, taps, _ = target.forward(params, tokens, cache, (0, 2))
  return taps, target.logits(params, hidden)


@pytest.fixture(scope="module")
def expected(packed, params, batch) -> tuple[float, np.ndarray]:
  """The loss and weight of all anchors, and how many slots each step has."""
  drafter = packed.trainer.drafter
  ours = oracle.doubles(params)
  embedding = np.asarray(packed.borrowed.embedding, np.float64)
  ids = packed.head_ids
  loss = weight = 0.0
  slots = np.zeros(STEPS)
  for tokens, mask in documents(batch):
    taps, logits = read(packed.trainer.target, packed.target_params, tokens)
    teacher = oracle.log_softmax(logits[:, ids])
    for anchor in oracle.anchors(mask, first=1):
      count = oracle.supervised(mask, anchor, STEPS)
      chain = oracle.eagle3_logits(
        drafter.config, ours, embedding, tokens, taps, anchor, count
      )
      said = oracle.log_softmax(chain)
      for step in range(count):
        slots[step] += 1
        if tokens[anchor + 1 + step] in ids:
          law = teacher[anchor + step]
          cost = (np.exp(law) * (law - said[step])).sum()
          loss += 0.8**step * cost
          weight += 0.8**step
  assert weight < 0.95 * (slots * 0.8 ** np.arange(STEPS)).sum()
  return np.array([loss / weight, weight]), slots


def judge(packed, params, batch, kind=Eagle3Learner):
  """The learner's loss and weight over all anchors, and its sums."""
  settings = dict(packed.trainer.learner.settings)
  settings |= {"num_anchors": ANSWER_TOKENS, "loss_chunk": S * S}
  learner = kind(
    packed.trainer.target, packed.trainer.drafter, tuple(settings.items())
  )

  @jax.jit
  def run(params, target_params, borrowed, batch):
    keys = row_keys(jax.random.key(0), jnp.arange(len(batch.tokens)))
    blocks = learner.draw(keys, batch)
    return learner.sums(params, target_params, borrowed, batch, blocks)

  sums = run(params, packed.target_params, packed.borrowed, batch)
  return np.array([sums.loss / sums.weight, sums.weight]), sums


def test_the_loss_is_that_of_chains_that_grow_pair_by_pair(
  packed, params, batch, expected
):
  """All documents of packed rows, all positions, in float64 numpy."""
  loss, sums = judge(packed, params, batch)
  np.testing.assert_allclose(loss, expected[0], rtol=TOLERANCE)
  np.testing.assert_array_equal(sums.supervised, expected[1])
  assert loss[0] > 0.5 and sums.supervised[-1] > 50


class SeesOwnState(Eagle3Learner):
  """Pairs the anchor with its own state, which decoding does not have yet."""

  def run(self, params, borrowed, context, blocks):
    late = dataclasses.replace(blocks, anchors=blocks.anchors + 1)
    return super().run(params, borrowed, context, late)


class SeesLabels(Eagle3Learner):
  """Feeds each step the token that it should say."""

  def run(self, params, borrowed, context, blocks):
    tokens = jnp.roll(blocks.tokens, -1, axis=-1)
    ahead = dataclasses.replace(blocks, tokens=tokens)
    return super().run(params, borrowed, context, ahead)


class TaughtLate(Eagle3Learner):
  """Takes the target's law after the label for the law of it."""

  def teach(self, target_params, last, blocks):
    late = dataclasses.replace(blocks, anchors=blocks.anchors + 1)
    return super().teach(target_params, last, late)


class StepsApart(Eagle3Learner):
  """Every step goes on from the target's state, as if it were the first."""

  def run(self, params, borrowed, context, blocks):
    hidden, text = context
    rows = jnp.maximum(blocks.anchors - 1, 0)
    first = gather(hidden, rows)
    steps = [
      self.drafter.continue_chains(
        self.bind(params, borrowed),
        (first, text),
        blocks.previous[..., [0, step]],
        rows - blocks.starts,
        see_text(rows, blocks.starts, S),
      )[-1]
      for step in range(1, STEPS)
    ]
    return jnp.stack([first, *steps], axis=2)


class SeesOtherDocuments(Eagle3Learner):
  """Forgets where documents begin."""

  def run(self, params, borrowed, context, blocks):
    starts = jnp.zeros_like(blocks.starts)
    whole = dataclasses.replace(blocks, starts=starts)
    return super().run(params, borrowed, context, whole)


class Even(Eagle3Learner):
  """Weighs all steps alike."""

  @property
  def objective(self):
    return dataclasses.replace(super().objective, slot_weights="uniform")


@pytest.mark.parametrize(
  "planted",
  [
    SeesOwnState,
    TaughtLate,
    *(
      pytest.param(kind, marks=pytest.mark.slow)
      for kind in (SeesLabels, StepsApart, SeesOtherDocuments, Even)
    ),
  ],
)
def test_a_planted_error_changes_the_loss(
  packed, params, batch, expected, planted
):
  loss, _ = judge(packed, params, batch, planted)
  assert np.abs(loss / expected[0] - 1).max() > 100 * TOLERANCE


def test_drafts_in_training_are_those_of_decoding(packed, params, corpus):
  """With the confidence that the proposal states, and at no other token."""
  learner = packed.trainer.learner
  drafter, P = learner.drafter, BLOCK_SIZE - 1
  bound = learner.bind(params, packed.borrowed)
  texts = [corpus.example(i)[0] for i in (3, 8)]
  width = min(map(len, texts)) - P
  tokens = np.stack([text[:width] for text in texts])
  taps = np.stack(
    [next(read(learner.target, packed.target_params, t)) for t in tokens]
  ).astype(np.float32)

  @jax.jit
  def draft(anchor):
    state = drafter.init_state(2, width, "float32")
    state = drafter.absorb(bound, state, taps, tokens, anchor)
    first = jnp.take_along_axis(tokens, anchor[:, None], axis=1)[:, 0]
    moment = Moment(jnp.zeros(2, jnp.uint32), anchor)
    proposal = drafter.propose(
      bound, state, first, packed.borrowed, Drafting(P), moment, anchor + 99
    )
    return proposal.tokens, proposal.confidence

  @jax.jit
  def say(tokens, anchor):
    batch = Batch(
      tokens, jnp.ones_like(tokens, bool), jnp.zeros_like(tokens), None
    )
    valid = jnp.ones((2, 1), bool)
    blocks = learner.cut(batch, anchor[:, None], valid, P)
    context = learner.read(params, packed.borrowed, taps, batch)
    hidden = learner.run(params, packed.borrowed, context, blocks)
    drafts = learner.say(params, packed.borrowed, hidden, None, None)
    return jax.nn.softmax(drafts.plain[:, 0])

  seen = set()
  for anchor in np.array([[1, 4], [5, 2], [width - P - 1, 7]]):
    drafted, confidence = draft(anchor)
    changed = tokens.copy()
    for row in range(2):
      changed[row, anchor[row] + 1 :][:P] = drafted[row]
    laws = say(changed, anchor)
    best = packed.head_ids[np.asarray(laws.argmax(-1))]
    np.testing.assert_array_equal(best, drafted)
    np.testing.assert_allclose(laws.max(-1), confidence, rtol=1e-4)
    seen |= set(np.ravel(drafted).tolist())
  assert len(seen) > 4


@pytest.mark.slow
def test_a_gradient_is_that_of_the_weighted_mean(packed, params, batch):
  """Through all steps: central differences along a random direction."""
  learner = packed.trainer.learner
  keys = row_keys(jax.random.key(0), jnp.arange(len(batch.tokens)))
  blocks = learner.draw(keys, batch)
  params = jax.tree.map(lambda x: x / 7 if x.ndim > 1 else x, params)

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    sums = learner.sums(
      params, packed.target_params, packed.borrowed, batch, blocks
    )
    return sums.loss / sums.weight

  _, gradient = loss(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.asarray(leaf).any(), jax.tree_util.keystr(path)
  rng = np.random.default_rng(0)
  way = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32) * 1e-3, params
  )
  up, down = (
    float(loss(jax.tree.map(lambda x, d, s=s: x + s * d, params, way))[0])
    for s in (1, -1)
  )
  slope = sum(
    float((g * d).sum())
    for g, d in zip(*map(jax.tree.leaves, (gradient, way)), strict=True)
  )
  assert (up - down) / 2 == pytest.approx(slope, rel=0.02)


def test_what_it_has_not_is_refused(model, corpus):
  drafter = make_baseline("eagle3", model.target.config)
  for settings, message in (
    ({"loss": "ce + selector"}, "trains a selector, and the drafter has none"),
    ({"loss": "kl + confidence"}, "trains a confidence, and the drafter"),
    ({"curriculum": 0.5}, "and the drafter corrects none"),
  ):
    with pytest.raises(ConfigError, match=message):
      make_setup(model, corpus, drafter=drafter, **settings)


def test_a_head_of_another_size_than_the_vocabulary_is_refused(packed):
  with pytest.raises(ConfigError, match="does not fit 7 columns"):
    packed.trainer.drafter.init(jax.random.key(0), columns=7)
