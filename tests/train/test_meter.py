"""Operations counted by hand; the pace from a clock that is set by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.conftest import make_setup
from train import meter
from train.meter import Meter, count_flops, peak_flops, update_flops


def ones(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_is_two_operations_for_each_of_its_terms():
  assert count_flops(jnp.dot, ones(3, 5), ones(5, 7)) == 2 * 3 * 5 * 7
  batched = ones(11, 3, 5), ones(11, 5, 7)
  assert count_flops(jnp.matmul, *batched) == 2 * 11 * 3 * 5 * 7


def test_loops_count_as_often_as_they_run_and_branches_at_their_dearest():
  def loop(x, y):
    return jax.lax.scan(lambda total, row: (total + row @ y, ()), x, x)[0]

  def branch(x, y):
    return jax.lax.cond(
      x.sum() > 0, lambda: x @ y, lambda: (x[:2] @ y).sum() + 0 * x
    )

  rows = ones(13, 5)
  assert count_flops(loop, rows, ones(5, 5)) == 13 * 2 * 5 * 5
  square = ones(5, 5)
  assert count_flops(branch, square, square) == 2 * 5 * 5 * 5


def test_a_gradient_that_nobody_asks_for_is_no_work():
  def cost(x, y):
    return (x @ y).sum() ** 2

  arguments = ones(3, 5), ones(5, 7)
  once = 2 * 3 * 5 * 7
  assert count_flops(jax.grad(cost), *arguments) == 2 * once
  assert count_flops(jax.grad(cost, (0, 1)), *arguments) == 3 * once


def formula(trainer, batch) -> int:
  """Of one update: every matrix product, by hand."""
  t, d = trainer.target.config, trainer.drafter.config
  B, S = batch.tokens.shape
  A, K = trainer.config.num_anchors, d.block_size
  # The target reads whole rows; it learns nothing, and says nothing.
  N, G, H, D = t.num_heads, t.num_kv_heads, t.head_width, t.width
  layer = D * H * (2 * N + 2 * G) + 3 * D * t.mlp_width + 2 * S * N * H
  flops = B * S * t.num_layers * layer
  # The context's projection needs no gradient of its input.
  taps = len(d.target_layer_ids) * D
  flops += 2 * B * S * taps * D
  N, G, H = d.num_heads, d.num_kv_heads, d.head_width
  context = B * S * 2 * D * G * H
  slot = D * H * (2 * N + 2 * G) + 3 * D * d.mlp_width + 2 * (S + K) * N * H
  flops += 3 * d.num_layers * (context + B * A * K * slot)
  # The head is frozen.
  flops += 2 * B * A * (K - 1) * D * d.vocab_size
  return 2 * flops


@pytest.mark.parametrize(
  "pieces",
  [{}, {"loss_chunk": 5, "anchor_chunk": 3, "accumulate": 2}],
  ids=["whole", "in pieces"],
)
def test_an_update_is_what_its_mathematics_asks_for(model, corpus, pieces):
  setup = make_setup(model, corpus, **pieces)
  state = setup.trainer.init_state(jax.random.key(0), setup.tap_scale())
  batch = setup.train_batch(0)
  found = update_flops(
    setup.trainer, state, setup.target_params, setup.borrowed, batch
  )
  assert found == formula(setup.trainer, batch)


def test_what_is_computed_again_would_count_if_it_were_traced(model, corpus):
  """The check above sees rematerialisation, were it not left out."""
  setup = make_setup(model, corpus, loss_chunk=5)
  state = setup.trainer.init_state(jax.random.key(0), setup.tap_scale())
  batch = setup.train_batch(0)
  arguments = (state, setup.target_params, setup.borrowed, batch)
  found = count_flops(setup.trainer.gradients, *arguments)
  assert found > formula(setup.trainer, batch)


# --- The pace -----------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
  """Seconds, which pass only as told."""
  now = types.SimpleNamespace(seconds=100.0)
  monkeypatch.setattr(meter.time, "perf_counter", lambda: now.seconds)
  return now


def test_the_pace_leaves_out_the_first_update_and_what_is_none(clock):
  count = Meter(flops=1000, dtype="float32")
  result = np.zeros(3)
  clock.seconds += 60  # compiles
  count.follow(result)
  assert count.read(slots=8) == {}
  for _ in range(4):
    clock.seconds += 0.5
    count.follow(result)
  found = count.read(slots=8)
  assert found["slots_per_s"] == pytest.approx(16)
  assert found["flops_per_s"] == pytest.approx(2000)
  clock.seconds += 30  # an evaluation
  count.restart()
  clock.seconds += 0.25
  count.follow(result)
  assert count.read(slots=8)["slots_per_s"] == pytest.approx(32)


def test_mfu_is_the_share_of_what_the_device_can_do(clock, monkeypatch):
  device = types.SimpleNamespace(
    device_kind="NVIDIA H100 80GB HBM3",
    memory_stats=lambda: {"peak_bytes_in_use": 123},
  )
  for name in ("devices", "local_devices"):
    monkeypatch.setattr(jax, name, lambda: [device])
  count = Meter(flops=int(989e12), dtype="bfloat16")
  count.follow(np.zeros(3))
  for _ in range(2):
    clock.seconds += 2
    count.follow(np.zeros(3))
  found = count.read(slots=8)
  assert found["mfu"] == pytest.approx(0.5)
  assert found["peak_memory_bytes"] == 123


@pytest.mark.parametrize(
  ("kind", "dtype", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
    ("NVIDIA H100 PCIe", "bfloat16", 756e12),
    ("NVIDIA H100 80GB HBM3", "float32", None),
    ("NVIDIA GB200", "bfloat16", 2500e12),
    ("NVIDIA B200", "bfloat16", 2250e12),
    ("TPU v5 lite", "bfloat16", 197e12),
    ("cpu", "bfloat16", None),
  ],
)
def test_peaks_are_known_by_the_name_of_the_device(kind, dtype, peak):
  assert peak_flops(kind, dtype) == peak


def test_a_cpu_has_no_mfu_and_no_memory_to_tell(clock):
  count = Meter(flops=1000, dtype="bfloat16")
  for _ in range(2):
    count.follow(np.zeros(3))
    clock.seconds += 1
  assert set(count.read(slots=8)) == {"slots_per_s", "flops_per_s"}
