"""Formulas of a slot against float64 loops, brute force and differences."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import losses

X, K, V = 7, 4, 11  # blocks, drafts, columns
TOLERANCE = {"rtol": 3e-6, "atol": 2e-6}  # float32 against float64


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
  return np.random.default_rng(0)


@pytest.fixture(scope="module")
def logits(rng) -> np.ndarray:
  return rng.normal(size=(X, K, V)).astype(np.float32) * 3


@pytest.fixture(scope="module")
def teacher(rng) -> np.ndarray:
  """log p; some tokens are impossible, one law is certain."""
  raw = rng.normal(size=(X, K, V)) * 2
  raw[1, 2, 3:7] = -np.inf
  raw[4, 0, 1:] = -np.inf
  p = np.exp(raw)
  with np.errstate(divide="ignore"):
    return np.log(p / p.sum(-1, keepdims=True)).astype(np.float32)


def law(logits: np.ndarray) -> np.ndarray:
  exp = np.exp(logits.astype(np.float64))
  return exp / exp.sum(-1, keepdims=True)


def slope(function, x: np.ndarray, directions: int = 5) -> None:
  """Checks jax.grad of a float64 function against central differences."""
  with jax.enable_x64():
    x = jnp.asarray(x, jnp.float64)
    gradient = jax.grad(function)(x)
    rng = np.random.default_rng(7)
    for _ in range(directions):
      way = rng.normal(size=x.shape)
      step = 1e-6
      rise = function(x + step * way) - function(x - step * way)
      np.testing.assert_allclose(
        float(rise) / (2 * step), float((gradient * way).sum()), rtol=1e-5
      )


# --- What a slot counts -------------------------------------------------------


@pytest.mark.parametrize(
  ("drafts", "gamma"),
  [(15, 7.0), (16, 7.0), (9, 5.0), (7, 4.0), (4, 2.5)],
  ids=["block 16", "block 16, anchor predicts", "10", "8 and DSpark's 7", "5"],
)
def test_decay_defaults_to_the_papers(drafts, gamma):
  expected = [math.exp(-(k - 1) / gamma) for k in range(1, drafts + 1)]
  np.testing.assert_allclose(losses.decay_weights(drafts, 0.0), expected, 1e-6)


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.0])
def test_dpace_weighs_by_the_survival_of_later_slots(rng, alpha):
  chances = rng.uniform(0.05, 0.95, (X, K))
  chances[3, 1] = 0.0  # a label that the head lacks
  lengths = rng.integers(0, K + 1, X)
  mask = np.arange(K) < lengths[:, None]
  with np.errstate(divide="ignore"):
    weights = losses.dpace_weights(-np.log(chances), mask, alpha)
  for row, j in np.ndindex(X, K):
    q = [(1 - alpha) * c + alpha for c in chances[row]]
    expected = sum(math.prod(q[: m + 1]) for m in range(j, lengths[row]))
    np.testing.assert_allclose(weights[row, j], expected, **TOLERANCE)


def test_dpace_weight_is_the_derivative_of_the_expected_accepted_length(rng):
  chances = rng.uniform(0.2, 0.9, 6)
  length = 5  # the last slot is not supervised

  def expected_length(log_q):
    return sum(math.exp(log_q[: m + 1].sum()) for m in range(length))

  log_q = np.log(chances)
  step = 1e-5
  derivative = [
    (expected_length(log_q + d) - expected_length(log_q - d)) / (2 * step)
    for d in np.eye(6) * step
  ]
  weights = losses.dpace_weights(-log_q, np.arange(6) < length, alpha=0.0)
  np.testing.assert_allclose(weights, derivative, rtol=1e-5, atol=1e-6)


def test_dpace_weights_are_detached():
  gradient = jax.grad(
    lambda x: losses.dpace_weights(x, np.ones(4, bool), 0.5).sum()
  )(np.array([0.1, 0.7, 1.9, 0.4]))
  assert not gradient.any()


# --- What a slot costs --------------------------------------------------------


def test_cross_entropy_is_minus_the_log_of_the_labels_chance(rng, logits):
  columns = rng.integers(0, V, (X, K))
  chances = np.take_along_axis(law(logits), columns[..., None], -1)[..., 0]
  found = losses.cross_entropy(logits, columns)
  np.testing.assert_allclose(found, -np.log(chances), **TOLERANCE)


def test_kl_runs_from_the_target_to_the_drafter(logits, teacher):
  expected = np.zeros((X, K))
  q = law(logits)
  for row, slot in np.ndindex(X, K):
    for v in range(V):
      p = math.exp(teacher[row, slot, v].astype(np.float64))
      if p:
        expected[row, slot] += p * math.log(p / q[row, slot, v])
  np.testing.assert_allclose(losses.kl(logits, teacher), expected, **TOLERANCE)
  gradient = jax.grad(lambda x: losses.kl(x, teacher).sum())(logits)
  np.testing.assert_allclose(gradient, q - np.exp(teacher), atol=1e-6)


def test_overlap_is_one_minus_half_the_distance(logits, teacher):
  p = np.exp(teacher.astype(np.float64))
  expected = 1 - np.abs(p - law(logits)).sum(-1) / 2
  found = losses.overlap(logits, teacher)
  np.testing.assert_allclose(found, expected, **TOLERANCE)
  slope(lambda x: losses.overlap(x, jnp.asarray(teacher)).sum(), logits)


def test_equal_laws_have_nothing_left_to_learn(logits):
  same = jax.nn.log_softmax(logits)
  np.testing.assert_allclose(losses.kl(logits, same), 0, atol=1e-5)
  np.testing.assert_allclose(losses.overlap(logits, same), 1, atol=1e-5)
  gradient = jax.grad(lambda x: losses.kl(x, same).sum())(logits)
  np.testing.assert_allclose(gradient, np.zeros_like(gradient), atol=1e-5)


def test_the_lk_hybrid_mixes_by_a_share_that_is_no_part_of_the_gradient(
  logits, teacher
):
  p, q = np.exp(teacher.astype(np.float64)), law(logits)
  alpha = np.minimum(p, q).sum(-1)
  share = np.exp(-3 * alpha)
  with np.errstate(divide="ignore", invalid="ignore"):
    kl = np.nansum(p * (np.log(p) - np.log(q)), -1)
  found = losses.lk_hybrid(jnp.asarray(kl), jnp.asarray(alpha))
  expected = share * kl + (1 - share) * (1 - alpha)
  np.testing.assert_allclose(found, expected, **TOLERANCE)
  by_kl, by_alpha = jax.grad(
    lambda kl, alpha: losses.lk_hybrid(kl, alpha).sum(), (0, 1)
  )(jnp.asarray(kl), jnp.asarray(alpha))
  np.testing.assert_allclose(by_kl, share, **TOLERANCE)
  np.testing.assert_allclose(by_alpha, share - 1, **TOLERANCE)


def test_the_expected_length_is_that_of_every_outcome(rng):
  """Rejection sampling of all draft chains over three tokens, enumerated."""
  tokens, depth = 3, 4
  p, q = rng.dirichlet(np.ones(tokens), (2, depth))
  alpha = np.minimum(p, q).sum(-1)
  expected = 0.0
  for chain in itertools.product(range(tokens), repeat=depth):
    drawn = math.prod(q[d, t] for d, t in enumerate(chain))
    survives = 1.0
    for d, token in enumerate(chain):
      survives *= min(1.0, p[d, token] / q[d, token])
      expected += drawn * survives
  mask = np.ones(depth, bool)
  found = losses.expected_length(jnp.asarray(alpha), mask)
  np.testing.assert_allclose(found, expected, **TOLERANCE)
  mask[2:] = False
  shorter = alpha[0] + alpha[0] * alpha[1]
  found = losses.expected_length(jnp.asarray(alpha), mask)
  np.testing.assert_allclose(found, shorter, **TOLERANCE)


def test_the_gradient_of_the_expected_length(logits, teacher):
  mask = np.arange(K) < np.array([4, 3, 4, 0, 1, 2, 4])[:, None]

  def length(x):
    alpha = losses.overlap(x, jnp.asarray(teacher))
    return losses.expected_length(alpha, mask).sum()

  slope(length, logits)


def test_calibration_is_least_at_the_chance_and_detached_from_it(rng):
  odds, chance = rng.normal(size=13) * 3, rng.uniform(size=13)
  c = 1 / (1 + np.exp(-odds))
  expected = -chance * np.log(c) - (1 - chance) * np.log(1 - c)
  arguments = (jnp.asarray(odds), jnp.asarray(chance))
  np.testing.assert_allclose(
    losses.calibration(*arguments), expected, rtol=1e-5, atol=1e-6
  )
  by_odds, by_chance = jax.grad(
    lambda x, y: losses.calibration(x, y).sum(), (0, 1)
  )(*arguments)
  np.testing.assert_allclose(by_odds, c - chance, atol=1e-6)
  assert not by_chance.any()
  assert np.isfinite(losses.calibration(jnp.array([-300.0, 300.0]), 0.5)).all()


@pytest.mark.parametrize("overwrites", [False, True])
def test_a_selectors_choice_with_and_without_its_misses(rng, overwrites):
  k = 3
  columns = np.stack([rng.permutation(V)[:k] for _ in range(X)])
  scores = rng.normal(size=(X, k)).astype(np.float32)
  labels = columns[:, 1].copy()
  labels[2], labels[3] = columns[2, 0], columns[3, 2]
  missed = (0, 5)
  for row in missed:
    labels[row] = next(v for v in range(V) if v not in columns[row])
  label_score = rng.normal(size=X).astype(np.float32)

  def cost(scores, label_score):
    is_label = columns == labels[:, None]
    return losses.pick(scores, is_label, label_score if overwrites else None)

  found = cost(jnp.asarray(scores), jnp.asarray(label_score))
  for row in range(X):
    rivals = scores[row].astype(np.float64)
    if row in missed:
      if not overwrites:
        assert found[row] == 0
        continue
      rivals[-1] = label_score[row]
      own = rivals[-1]
    else:
      own = rivals[columns[row].tolist().index(labels[row])]
    expected = math.log(np.exp(rivals).sum()) - own
    np.testing.assert_allclose(found[row], expected, **TOLERANCE)
  by_score, by_label = jax.grad(lambda s, g: cost(s, g).sum(), (0, 1))(
    jnp.asarray(scores), jnp.asarray(label_score)
  )
  learns = np.asarray(by_score).any(-1)
  assert learns.all() if overwrites else (~learns[list(missed)]).all()
  taught = np.flatnonzero(np.asarray(by_label)).tolist()
  assert taught == (list(missed) if overwrites else [])


def test_a_label_is_best_when_no_logit_beats_it():
  logits = np.array([[1.0, 3.0, 2.0], [3.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
  columns = np.array([1, 1, -1])
  found = losses.is_best(logits, columns)
  assert found.tolist() == [True, True, False]  # a tie counts, a lack does not
