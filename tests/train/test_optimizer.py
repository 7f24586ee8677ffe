"""Which parameters move how: routes, schedules, Muon's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dflash_jax.config import ConfigError, TrainConfig
from dflash_jax.drafters import DFlash
from tests.testing import VARIANTS, tiny_drafter_config, tiny_target_config
from train.optimizer import TABLES, make_optimizer, make_schedule, route

# --- Routes -------------------------------------------------------------------

PARTS = {"dflash": {}} | VARIANTS
EXPECTED = {
  "dflash": set(),
  "dflash2": {"predecessors", "successors"},
  "dspark": {"before", "after"},
  "dspark gated": {"before", "after"},
  "dspark rnn": {"before", "after"},
  "domino": {"widen"},
  "domino shifted": {"widen"},
}


def routes(name: str) -> dict[tuple[str, ...], tuple[str, tuple[int, ...]]]:
  """By path: the route, and the shape."""
  config = tiny_drafter_config(tiny_target_config(), **PARTS[name])
  params = jax.eval_shape(DFlash(config).init, jax.random.key(0))
  shapes = jax.tree_util.tree_leaves_with_path(params)
  kinds = jax.tree.leaves(route(params))
  return {
    tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): (
      kind,
      leaf.shape,
    )
    for (path, leaf), kind in zip(shapes, kinds, strict=True)
  }


@pytest.mark.parametrize("name", PARTS)
def test_every_parameter_has_the_route_of_what_it_is(name):
  found = routes(name)
  tables = {
    part
    for path, (kind, _) in found.items()
    if kind == "table"
    for part in path
  }
  assert tables & TABLES == EXPECTED[name]
  for path, (kind, shape) in found.items():
    if 263 in shape:  # the vocabulary
      assert kind == "table", path
    elif path[-1] in ("scale", "bias", "base"):
      assert kind == "vector", path
    elif "confidence" in path:
      assert kind == "vector", path  # one column
    else:
      assert kind == "matrix", path
  kinds = {kind for kind, _ in found.values()}
  assert {"matrix", "vector"} <= kinds


# --- Rates --------------------------------------------------------------------


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


@pytest.mark.parametrize(
  ("schedule", "middle", "end"),
  [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)],
)
def test_schedules_rise_to_the_peak_and_end_where_they_should(
  schedule, middle, end
):
  config = TrainConfig(
    steps=200,
    warmup=0.1,
    learning_rate=0.5,
    final_learning_rate=0.1,
    schedule=schedule,
  )
  rate = make_schedule(config)
  assert float(rate(0)) == 0.0
  assert float(rate(10)) == pytest.approx(0.25)
  assert float(rate(20)) == pytest.approx(0.5)
  assert float(rate(110)) == pytest.approx(0.5 * middle)
  assert float(rate(200)) == pytest.approx(0.5 * end)


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


def test_gradients_are_clipped_by_their_global_norm():
  settings = TrainConfig(clip_norm=1e-3)
  gradients = {"a": jnp.full((3,), 4.0), "b": jnp.full((1,), 2.0)}
  optimizer = make_optimizer(settings)
  _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
  moments = [s for s in jax.tree.leaves(state) if s.shape == (3,)]
  norm = float(optax.tree.norm(gradients))
  first_moment = (1 - settings.beta1) * 4.0 * 1e-3 / norm
  assert float(moments[0][0]) == pytest.approx(first_moment, rel=1e-4)


def test_what_is_no_optimiser_or_schedule_is_refused():
  with pytest.raises(ConfigError, match="optimizer='sgd' is unknown; choose"):
    make_optimizer(TrainConfig(optimizer="sgd"))
  with pytest.raises(ConfigError, match="schedule='step' is unknown; choose"):
    make_optimizer(TrainConfig(schedule="step"))


# --- Muon ---------------------------------------------------------------------


def orthogonalize(x: np.ndarray) -> np.ndarray:
  """Jordan 2024: five quintic Newton-Schulz steps, in float64."""
  is_tall = x.shape[0] > x.shape[1]
  x = (x.T if is_tall else x) / np.linalg.norm(x)
  for _ in range(5):
    gram = x @ x.T
    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
  return x.T if is_tall else x


@pytest.mark.parametrize("shape", [(5, 13), (11, 3)])
def test_steps_of_muon_by_its_formula(shape):
  """Nesterov momentum with bias corrections, RMS matched to 0.2."""
  beta, rate, decay = 0.9, 0.5, 0.125
  config = TrainConfig(
    optimizer="muon",
    schedule="constant",
    steps=10,
    warmup=0.1,  # one step
    learning_rate=rate,
    momentum=beta,
    weight_decay=decay,
    clip_norm=1e9,
  )
  rng = np.random.default_rng(0)
  x = rng.normal(size=shape).astype(np.float32)
  optimizer = make_optimizer(config)
  params = {"kernel": jnp.asarray(x)}
  state, moment = optimizer.init(params), np.zeros(shape)
  for step in range(3):
    gradient = rng.normal(size=shape).astype(np.float32)
    update, state = optimizer.update({"kernel": gradient}, state, params)
    moment = beta * moment + (1 - beta) * gradient
    ahead = beta * moment / (1 - beta ** (step + 2))
    ahead += (1 - beta) * gradient / (1 - beta ** (step + 1))
    now = rate if step else 0.0
    expected = 0.2 * np.sqrt(max(shape)) * orthogonalize(ahead) + decay * x
    np.testing.assert_allclose(
      update["kernel"], -now * expected, rtol=2e-4, atol=1e-5
    )
  size = np.sqrt(
    np.mean((np.asarray(update["kernel"]) / rate + decay * x) ** 2)
  )
  assert size == pytest.approx(0.2, rel=0.25)  # about Adam's


def test_muon_leaves_tables_the_full_rate_and_vectors_their_share():
  settings = TrainConfig(
    optimizer="muon",
    schedule="constant",
    warmup=0.01,
    learning_rate=0.5,
    vector_rate=0.1,
    clip_norm=1e9,
  )
  optimizer = make_optimizer(settings)
  params = {
    "corrector": {"before": jnp.ones((7, 3))},
    "norm": {"scale": jnp.ones(3)},
    "mlp": {"kernel": jnp.ones((3, 5))},
  }
  state = optimizer.init(params)
  gradients = jax.tree.map(jnp.ones_like, params)
  for _ in range(settings.steps // 100 + 1):
    update, state = optimizer.update(gradients, state, params)
  sizes = jax.tree.map(lambda x: float(jnp.abs(x).max()), update)
  assert sizes["corrector"]["before"] == pytest.approx(0.5, rel=1e-3)
  assert sizes["norm"]["scale"] == pytest.approx(0.05, rel=1e-3)
  assert sizes["mlp"]["kernel"] not in (
    pytest.approx(0.5, rel=1e-2),
    pytest.approx(0.05, rel=1e-2),
  )
