"""Drafts from independent marginals: their labels, laws and signals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.noise import Stream, race_times
from dflash_jax.proposal import (
  Drafting,
  Moment,
  from_best,
  from_marginals,
)
from dflash_jax.sampling import Sampling
from pallas_kernels.lm_head_verify import lm_head_verify

B, D, V, COLUMNS = 2, 4, 23, 11
IDS = jnp.asarray(np.sort(np.random.default_rng(5).permutation(V)[:COLUMNS]))
DRAWN = Sampling(0.8, top_k=7)


def make_logits(batch=B, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(batch, D, COLUMNS)) * 2, jnp.float32)


def make_moment(batch=B):
  return Moment(
    seeds=jnp.arange(batch, dtype=jnp.uint32) + 5,
    positions=jnp.arange(batch, dtype=jnp.int32) * 3 + 2,
  )


def propose(drafting, logits=None, moment=None):
  logits = make_logits() if logits is None else logits
  moment = make_moment(len(logits)) if moment is None else moment
  return from_marginals(logits, IDS, drafting, moment, V)


def test_a_greedy_chain_is_the_best_token_of_each_depth():
  logits = make_logits()
  for count in (0, 1, 3, D):
    offer = propose(Drafting(count))
    best = IDS[logits[:, :count].argmax(-1)]
    np.testing.assert_array_equal(offer.tokens, best)
    assert offer.law is None and offer.tree is None
  probs = jax.nn.softmax(logits)
  np.testing.assert_allclose(offer.confidence, probs.max(-1), rtol=1e-5)
  two = np.sort(logits, axis=-1)[..., -2:]
  np.testing.assert_allclose(offer.margins, two[..., 1] - two[..., 0], 1e-5)


def test_a_chain_of_best_tokens_needs_no_logits():
  """The same proposal, from what the head's statistics say."""
  logits = make_logits()
  flat = logits.reshape(-1, COLUMNS)
  stats = lm_head_verify(flat, jnp.eye(COLUMNS), vocab_axis=1)
  stats = jax.tree.map(lambda row: row.reshape(logits.shape[:2]), stats)
  found, wanted = from_best(stats, IDS), propose(Drafting(D))
  np.testing.assert_array_equal(found.tokens, wanted.tokens)
  np.testing.assert_allclose(found.confidence, wanted.confidence, 1e-5)
  np.testing.assert_allclose(found.margins, wanted.margins, 1e-5)
  bare = from_best(stats, None)
  np.testing.assert_array_equal(bare.tokens, logits.argmax(-1))


def test_a_drawn_chain_states_the_law_it_was_drawn_from():
  """Counts of 20,011 draws against the stated law."""
  draws = 20_011
  logits = jnp.repeat(make_logits(1), draws, axis=0)
  offer = propose(Drafting(D, sampling=DRAWN), logits)
  law = np.asarray(offer.law.probs[0])
  np.testing.assert_allclose(law.sum(-1), 1, rtol=1e-5)
  assert ((law > 0).sum(-1) == 7).all()
  tokens = np.asarray(offer.tokens)
  for depth in range(D):
    counts = np.bincount(tokens[:, depth], minlength=V) / draws
    np.testing.assert_allclose(
      counts[np.asarray(IDS)], law[depth], atol=5 * 0.5 / np.sqrt(draws)
    )
  np.testing.assert_array_equal(IDS[offer.law.ranked[..., 0]], tokens)


def test_drawn_signals_do_not_depend_on_the_draw():
  """Non-anticipation: other noise, other tokens, the same signals and shape."""
  for drafting in (
    Drafting(D, sampling=DRAWN),
    Drafting(9, is_tree=True, sampling=DRAWN),
  ):
    first = propose(drafting)
    second = propose(
      drafting, moment=Moment(make_moment().seeds + 1, make_moment().positions)
    )
    assert np.any(first.tokens != second.tokens)
    np.testing.assert_array_equal(first.confidence, second.confidence)
    np.testing.assert_array_equal(first.margins, second.margins)
    if drafting.is_tree:
      jax.tree.map(np.testing.assert_array_equal, first.tree, second.tree)


def test_coupled_drafts_are_where_the_target_would_fall_under_their_law():
  logits, moment = make_logits(), make_moment()
  drafting = Drafting(D, sampling=DRAWN, is_coupled=True)
  offer = propose(drafting)
  assert offer.law is None
  for row, depth in itertools.product(range(B), range(D)):
    position = moment.positions[row] + 1 + depth
    times = race_times(
      Stream.CHOICE, moment.seeds[row : row + 1], position[None], V
    )[0]
    scores = logits[row, depth] / DRAWN.temperature
    kept = scores >= np.sort(scores)[-DRAWN.top_k]
    speed = jnp.where(kept, jnp.exp(scores), 0) / times[IDS]
    assert int(offer.tokens[row, depth]) == int(IDS[speed.argmax()])


@pytest.mark.parametrize(
  "drafting",
  [
    Drafting(9, is_tree=True),
    Drafting(9, is_tree=True, sampling=DRAWN),
    Drafting(9, is_tree=True, sampling=DRAWN, is_coupled=True),
  ],
  ids=["greedy", "drawn", "coupled"],
)
def test_siblings_differ_and_every_prefix_is_a_tree(drafting):
  offer = propose(drafting)
  parents, tokens = np.asarray(offer.tree.parents), np.asarray(offer.tokens)
  for row in range(B):
    edges = list(zip(parents[row], tokens[row], strict=True))
    assert len(set(edges)) == 9
  small = offer.prefix(4)
  assert small.num_nodes == small.tree.num_nodes == 4
  np.testing.assert_array_equal(small.tokens, tokens[:, :4])
  assert np.asarray(small.tree.parents).max() <= 4


def test_a_greedy_trees_best_path_begins_with_the_chains_first_draft():
  chain, tree = propose(Drafting(D)), propose(Drafting(9, is_tree=True))
  np.testing.assert_array_equal(tree.tokens[:, 0], chain.tokens[:, 0])
  np.testing.assert_allclose(
    tree.confidence[:, 0], chain.confidence[:, 0], rtol=1e-5
  )
  np.testing.assert_allclose(tree.margins[:, 0], chain.margins[:, 0], rtol=1e-5)


def test_draws_without_replacement_follow_successive_sampling():
  """Ordered pairs at depth 1 of a tree against q(a) q(b) / (1 - q(a))."""
  draws = 20_011
  logits = jnp.repeat(make_logits(1), draws, axis=0)
  law = propose(Drafting(5, is_tree=True, sampling=Sampling(1.0)), logits).law
  ranked = np.asarray(law.ranked[:, 0, :2])
  q = np.asarray(law.probs[0, 0], np.float64)
  expected = q[:, None] * q / (1 - q[:, None])
  np.fill_diagonal(expected, 0)
  counts = np.zeros((COLUMNS, COLUMNS))
  np.add.at(counts, (ranked[:, 0], ranked[:, 1]), 1)
  np.testing.assert_allclose(
    counts / draws, expected, atol=5 * 0.5 / np.sqrt(draws)
  )
