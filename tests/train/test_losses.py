"""Losses against slow float64 loops written from the papers' formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.config import ConfigError, TrainConfig
from train.losses import decay_weights, dpace_weights, slot_sums

X, K, V = 7, 5, 11  # blocks, slots with the anchor, columns
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}  # float32 against float64


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
  """Logits, label columns and masks; some labels are outside the head."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(X, K - 1, V)).astype(np.float32) * 3
  columns = rng.integers(0, V, (X, K - 1)).astype(np.int32)
  columns[0] = logits[0].argmax(-1)  # a block all right
  columns[1, :2] = logits[1, :2].argmax(-1)
  columns[2, :] = logits[2].argmax(-1)
  columns[2, 1] = -1  # its run breaks where the head lacks the label
  columns[3, 0] = -1
  length = rng.integers(1, K, X)
  length[:3] = K - 1
  length[6] = 0  # an invalid block
  mask = np.arange(K - 1) < length[:, None]
  return {"logits": logits, "columns": columns, "mask": mask}


def probability(logits: np.ndarray, column: int) -> float:
  """Softmax in float64; 0 for a column the head lacks."""
  if column < 0:
    return 0.0
  exp = np.exp(logits.astype(np.float64))
  return exp[column] / exp.sum()


def slow_sums(data, weight_of) -> dict[str, float | np.ndarray]:
  """slot_sums, slot by slot; weight_of(probabilities, length, slot)."""
  loss = weight = accepted = blocks = 0.0
  correct, supervised = np.zeros(K - 1), np.zeros(K - 1)
  for logits, columns, mask in zip(
    data["logits"], data["columns"], data["mask"], strict=True
  ):
    length = int(mask.sum())
    chances = [probability(logits[k], columns[k]) for k in range(length)]
    blocks += length > 0
    unbroken = True
    for k in range(length):
      supervised[k] += 1
      right = columns[k] >= 0 and logits[k].argmax() == columns[k]
      correct[k] += right
      unbroken = unbroken and right
      accepted += unbroken
      if columns[k] >= 0:
        weight += weight_of(chances, length, k)
        loss -= weight_of(chances, length, k) * math.log(chances[k])
  return {
    "loss": loss,
    "weight": weight,
    "correct": correct,
    "supervised": supervised,
    "accepted": accepted,
    "blocks": blocks,
  }


def check(config: TrainConfig, data, weight_of):
  sums = jax.jit(slot_sums, static_argnums=3)(
    data["logits"], data["columns"], data["mask"], Frozen(config)
  )
  for name, value in slow_sums(data, weight_of).items():
    np.testing.assert_allclose(
      getattr(sums, name), value, **TOLERANCE, err_msg=name
    )


class Frozen:
  """A TrainConfig that jit can hash."""

  def __init__(self, config: TrainConfig):
    self.loss, self.decay = config.loss, config.decay
    self.dpace_alpha = config.dpace_alpha


@pytest.mark.parametrize("gamma", [1.7, 4.0])
def test_cross_entropy_decays_with_the_slot(data, gamma):
  check(
    TrainConfig(loss="ce", decay=gamma),
    data,
    lambda chances, length, k: math.exp(-k / gamma),
  )


@pytest.mark.parametrize(
  ("block_size", "gamma"), [(16, 7.0), (10, 5.0), (8, 4.0), (5, 2.5)]
)
def test_decay_defaults_to_the_papers(block_size, gamma):
  expected = [math.exp(-(k - 1) / gamma) for k in range(1, block_size)]
  np.testing.assert_allclose(decay_weights(block_size, 0.0), expected, 1e-6)


def smooth(chances: list[float], alpha: float) -> list[float]:
  return [(1 - alpha) * q + alpha for q in chances]


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.0])
def test_dpace_weighs_by_the_survival_of_later_slots(data, alpha):
  def weight_of(chances, length, j):
    q = smooth(chances, alpha)
    return sum(math.prod(q[: m + 1]) for m in range(j, length))

  check(TrainConfig(loss="dpace", dpace_alpha=alpha), data, weight_of)


def test_dpace_weight_is_the_derivative_of_the_expected_accepted_length():
  rng = np.random.default_rng(1)
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
  weights = dpace_weights(-log_q, np.arange(6) < length, alpha=0.0)
  np.testing.assert_allclose(weights, derivative, rtol=1e-5, atol=1e-6)


def test_weights_are_detached(data):
  """The gradient is that of cross-entropy under fixed weights."""
  logits, columns, mask = data["logits"], data["columns"], data["mask"]
  config = TrainConfig(loss="dpace")
  known = mask & (columns >= 0)

  def cross_entropy(logits):
    chosen = jnp.take_along_axis(
      jax.nn.log_softmax(logits), jnp.maximum(columns, 0)[..., None], -1
    )[..., 0]
    return jnp.where(known, -chosen, 0.0)

  surprise = jnp.where(known, cross_entropy(logits), jnp.inf)
  weights = dpace_weights(surprise, mask, config.dpace_alpha)
  weights = np.where(known, weights, 0.0)
  gradient = jax.grad(lambda x: slot_sums(x, columns, mask, config).loss)(
    logits
  )
  expected = jax.grad(lambda x: (weights * cross_entropy(x)).sum())(logits)
  np.testing.assert_allclose(gradient, expected, **TOLERANCE)
  assert np.isfinite(gradient).all()


def test_a_label_outside_the_trimmed_head_costs_nothing_and_breaks_the_run(
  data,
):
  for loss in ("ce", "dpace"):
    config = TrainConfig(loss=loss)
    one = {name: array[2:3] for name, array in data.items()}
    sums = slot_sums(one["logits"], one["columns"], one["mask"], config)
    assert sums.correct.tolist() == [1, 0, 1, 1]
    assert sums.supervised.tolist() == [1, 1, 1, 1]
    assert float(sums.accepted) == 1.0
    gradient = jax.grad(
      lambda x, c=config, o=one: slot_sums(x, o["columns"], o["mask"], c).loss
    )(one["logits"])
    assert not np.asarray(gradient)[0, 1].any()
    assert np.asarray(gradient)[0, 2].any()


@pytest.mark.parametrize("loss", ["ce", "dpace"])
def test_sums_over_pieces_add_up_to_the_whole(data, loss):
  config = TrainConfig(loss=loss)
  order = ("logits", "columns", "mask")
  whole = slot_sums(*(data[name] for name in order), config)
  pieces = [
    slot_sums(*(data[name][part] for name in order), config)
    for part in (slice(0, 2), slice(2, 3), slice(3, 7))
  ]
  for field in dataclasses.fields(whole):
    total = sum(getattr(piece, field.name) for piece in pieces)
    np.testing.assert_allclose(
      getattr(whole, field.name), total, **TOLERANCE, err_msg=field.name
    )


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("loss", ["ce", "dpace"])
def test_soft_labels_share_in_the_loss_and_keep_the_weights(data, loss, share):
  """CE against the teacher's softmax, slot by slot in float64."""
  config = TrainConfig(loss=loss, teacher_share=share)
  rng = np.random.default_rng(4)
  teacher = rng.normal(size=data["logits"].shape).astype(np.float32) * 2
  order = (data[name] for name in ("logits", "columns", "mask"))
  arguments = (*order, config)
  hard = slot_sums(*arguments)
  mixed = slot_sums(*arguments, teacher)
  logits = data["logits"].astype(np.float64)
  log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  p = np.exp(teacher.astype(np.float64))
  p /= p.sum(-1, keepdims=True)
  soft = -(p * log_q).sum(-1)
  known = data["mask"] & (data["columns"] >= 0)
  column = np.maximum(data["columns"], 0)[..., None]
  label = -np.take_along_axis(log_q, column, -1)[..., 0]
  if loss == "ce":
    weights = np.broadcast_to(decay_weights(K, 0.0), known.shape)
  else:
    surprise = np.where(known, label, np.inf)
    weights = dpace_weights(surprise, data["mask"], config.dpace_alpha)
  expected = (1 - share) * label + share * soft
  expected = np.where(known, weights * expected, 0).sum()
  np.testing.assert_allclose(mixed.loss, expected, rtol=1e-5)
  for name in ("weight", "correct", "accepted"):
    np.testing.assert_array_equal(getattr(hard, name), getattr(mixed, name))


def test_a_student_that_equals_its_teacher_has_nothing_left_to_learn(data):
  config = TrainConfig(teacher_share=1.0)
  logits, columns, mask = data["logits"], data["columns"], data["mask"]
  gradient = jax.grad(
    lambda x: slot_sums(x, columns, mask, config, logits).loss
  )(logits)
  np.testing.assert_allclose(gradient, np.zeros_like(gradient), atol=1e-5)


def test_an_unknown_loss_is_refused(data):
  with pytest.raises(ConfigError, match="'mse' is unknown; choose 'ce'"):
    slot_sums(
      data["logits"], data["columns"], data["mask"], TrainConfig(loss="mse")
    )
