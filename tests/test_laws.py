"""Laws by row choose what the static Sampling of each row chooses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import laws, noise, sampling
from dflash_jax.laws import Kind, Laws
from dflash_jax.prediction import Prediction
from dflash_jax.sampling import GREEDY, Sampling

DRAWN = [Sampling(0.7), Sampling(1.0), Sampling(1.9)]
RESTRICTED = [
  Sampling(1.0, top_k=1),
  Sampling(0.8, top_k=5),
  Sampling(1.3, top_k=10_000),
  Sampling(1.0, top_p=0.9),
  Sampling(0.6, top_p=0.3),
  Sampling(1.0, min_p=0.1),
  Sampling(1.5, top_k=17, top_p=0.8),
  Sampling(1.1, top_k=40, top_p=0.95, min_p=0.02),
]
MIXED = [GREEDY, *DRAWN, *RESTRICTED, Sampling(0.0, top_k=3, top_p=0.5)]
V = 131


def logits_of(rows, tokens=7, vocab=V):
  """Coarse ones, so that there are ties."""
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(rows, tokens, vocab)) * 2
  return jnp.asarray(np.round(logits, 1), jnp.float32)


def addresses(rows, tokens=7):
  seeds = jnp.arange(rows, dtype=jnp.uint32) * 977 + 5
  positions = 11 + jnp.tile(jnp.arange(tokens), (rows, 1))
  return seeds, positions


def test_kind_is_that_of_the_most_demanding_row():
  assert Laws.of([GREEDY, MIXED[-1]]).kind == Kind.GREEDY
  assert Laws.of([GREEDY, *DRAWN]).kind == Kind.DRAWN
  assert Laws.of(MIXED).kind == Kind.RESTRICTED


def test_a_batch_of_all_kinds_chooses_as_each_row_would_alone():
  B = len(MIXED)
  logits, (seeds, positions) = logits_of(B), addresses(B)
  chosen = jax.jit(laws.choose)(logits, Laws.of(MIXED), seeds, positions)
  for row, law in enumerate(MIXED):
    one = slice(row, row + 1)
    alone = sampling.choose(logits[one], law, seeds[one], positions[one])
    np.testing.assert_array_equal(chosen[one], alone, str(law))
  assert len({*np.asarray(chosen).ravel().tolist()}) > 20


def test_the_search_and_the_race_agree():
  """The two forms of the same choice, of which a CPU takes the second."""
  B = len(RESTRICTED)
  logits, (seeds, positions) = logits_of(B), addresses(B)
  times = noise.race_times(0, seeds[:, None], positions, V)
  rows = Laws.of(RESTRICTED)
  np.testing.assert_array_equal(
    laws._win(logits, times, rows), laws._win_in_nucleus(logits, times, rows)
  )


def test_weights_are_those_of_static_laws():
  rows = DRAWN + RESTRICTED
  logits = logits_of(len(rows))
  weights = laws.weigh(logits, Laws.of(rows))
  for row, law in enumerate(rows):
    expected = sampling.weigh(logits[row], law)
    np.testing.assert_array_equal(weights[row] > 0, expected > 0, str(law))
    np.testing.assert_allclose(weights[row], expected, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 13, 30, 31])
def test_the_largest_are_found_whatever_their_sign(count):
  rng = np.random.default_rng(count)
  logits = rng.choice(
    [-0.0, 0.0, -1e30, 1e-30, 3.5, -2.0, 7.0], size=(2, 3, 31)
  )
  logits[0] += rng.normal(size=(3, 31))
  logits = logits.astype(np.float32)
  last = np.sort(logits, axis=-1)[..., -count, None]
  found = laws._is_among(jnp.asarray(logits), jnp.full((2, 1, 1), count))
  np.testing.assert_array_equal(found, logits >= last)


@pytest.mark.parametrize("rows", [[GREEDY] * 3, [GREEDY, *DRAWN], MIXED])
def test_a_prediction_knows_each_kind(rows):
  """From hidden states, for chains and for the places of a tree."""
  B, D = len(rows), 19
  rng = np.random.default_rng(5)
  said = Prediction(
    jnp.asarray(rng.normal(size=(B, 4, D)), jnp.float32),
    jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
  )
  seeds, positions = addresses(B, 3)
  places = jnp.tile(jnp.array([0, 1, 1, 2]), (B, 1))
  chosen = said.choose(Laws.of(rows), seeds, positions, places)
  for row, law in enumerate(rows):
    one = slice(row, row + 1)
    alone = Prediction(said.hidden[one], said.head)
    expected = alone.choose(law, seeds[one], positions[one], places[one])
    np.testing.assert_array_equal(chosen[one], expected, str(law))


def test_greedy_batches_make_no_noise_and_free_ones_no_search():
  """Restrictions that no row asks for cost nothing: they are not there."""
  said = Prediction(jnp.ones((2, 3, 19)), jnp.ones((19, V)))
  seeds, positions = addresses(2, 3)

  def program(rows):
    chosen = functools.partial(said.choose, seeds=seeds, positions=positions)
    return str(jax.make_jaxpr(chosen)(Laws.of(rows)))

  assert "shift_right_logical" not in program([GREEDY] * 2)
  free = program([GREEDY, Sampling(1.0)])
  assert "shift_right_logical" in free and "while" not in free
  assert "while" in program([GREEDY, Sampling(1.0, top_p=0.9)])
