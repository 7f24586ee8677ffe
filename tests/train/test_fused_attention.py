"""One attention over context and blocks equals two, merged."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import layers
from dflash_jax.config import TrainConfig
from train import fused_attention
from train.fused_attention import attend_fused, can_fuse, divide
from train.learners import blocks as blocks_lib

B, A, K, S, N, G, H = 2, 5, 3, 11, 6, 2, 8


def _operands(dtype):
  keys = iter(jax.random.split(jax.random.key(3), 8))

  def draw(*shape):
    return jax.random.normal(next(keys), shape).astype(dtype)

  query = draw(B * A, K, N, H)
  own = draw(B * A, G, K, H), draw(B * A, G, K, H)
  context = draw(B, G, S, H), draw(B, G, S, H)
  visible = jax.random.bernoulli(next(keys), 0.5, (B, A * K, S))
  visible = visible.at[0, :K].set(False)  # a block that sees itself alone
  return query, own, context, visible


def _attend_twice(query, own, context, visible, mask):
  block = layers.attend_with_lse(query, *own, mask)
  rows = query.reshape(B, A * K, N, H)
  out, lse = layers.attend_with_lse(rows, *context, visible)
  seen = out.reshape(query.shape), lse.reshape(query.shape[:-1])
  return layers.merge_attention(seen, block)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("group", [1, 2 * K, 1000])
def test_equals_two_attentions_merged_by_log_sum_exp(
  monkeypatch, group, is_causal
):
  monkeypatch.setattr(fused_attention, "GROUP", group)
  query, own, context, visible = _operands(jnp.float32)
  mask = jnp.ones((1, K, K), bool)
  mask = jnp.tril(mask) if is_causal else mask

  def fused(query, own, context):
    return attend_fused(query, own, context, visible, mask, "xla")

  def twice(query, own, context):
    return _attend_twice(query, own, context, visible, mask)

  wanted, pull_wanted = jax.vjp(twice, query, own, context)
  found, pull_found = jax.vjp(fused, query, own, context)
  np.testing.assert_allclose(found, wanted, atol=2e-6)
  cotangent = jax.random.normal(jax.random.key(5), wanted.shape)
  for x, y in zip(
    jax.tree.leaves(pull_found(cotangent)),
    jax.tree.leaves(pull_wanted(cotangent)),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, atol=5e-6)


def test_in_bfloat16_it_agrees_too():
  """By cuDNN, where there is a GPU: groups and context of odd sizes."""
  implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
  operands = _operands(jnp.bfloat16)
  mask = jnp.ones((1, K, K), bool)

  def outcome(attend, operands):
    *inputs, visible = operands
    out, pull = jax.vjp(lambda *x: attend(*x, visible, mask), *inputs)
    cotangent = jax.random.normal(jax.random.key(7), out.shape)
    return jax.tree.leaves((out, pull(cotangent)))

  def fused(*arguments):
    return attend_fused(*arguments, implementation)

  *exact, visible = operands
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), exact)
  for found, wanted in zip(
    outcome(fused, operands),
    outcome(_attend_twice, (*exact, visible)),
    strict=True,
  ):
    error = jnp.linalg.norm(found.astype(jnp.float32) - wanted)
    assert error < 0.01 * jnp.linalg.norm(wanted)


def test_other_blocks_and_hidden_context_change_nothing():
  query, own, context, visible = _operands(jnp.float32)
  mask = jnp.ones((1, K, K), bool)
  before = attend_fused(query, own, context, visible, mask, "xla")
  changed = tuple(x.at[1].add(7.0) for x in own)
  after = attend_fused(query, changed, context, visible, mask, "xla")
  same = np.all(np.asarray(before == after), axis=(1, 2, 3))
  assert same.tolist() == [row != 1 for row in range(B * A)]
  hidden = tuple(x.at[0].add(7.0) for x in context)
  after = attend_fused(query, own, hidden, visible, mask, "xla")
  assert np.array_equal(before[0], after[0])  # it sees no context


def test_a_cpu_keeps_two_attentions():
  assert not can_fuse(jnp.zeros((2, 3, 5, 64), jnp.bfloat16))


class _Gpu:
  platform = "gpu"
  compute_capability = "9.0"


@pytest.mark.parametrize(
  ("dtype", "width", "fits"),
  [("bfloat16", 64, True), ("float32", 64, False), ("bfloat16", 256, False)],
)
def test_a_gpu_fuses_what_its_library_takes(monkeypatch, dtype, width, fits):
  monkeypatch.setattr(jax, "devices", lambda: [_Gpu])
  assert can_fuse(jnp.zeros((2, 3, 5, width), dtype)) == fits


@pytest.mark.parametrize(
  ("blocks", "K", "groups", "count"),
  [
    (512, 16, 32, 16),
    (64, 8, 2, 32),
    (37, 8, 2, 19),  # one void block
    (74, 7, 3, 26),  # an even number of slots
    (1, 7, 1, 2),
    (3, 400, 3, 1),  # a block is never cut
  ],
)
def test_blocks_divide_into_groups(blocks, K, groups, count):
  assert divide(blocks, K) == (groups, count)


def test_the_block_learner_asks_for_it_unless_told_not_to(monkeypatch):
  asked = []
  monkeypatch.setattr(blocks_lib, "can_fuse", lambda keys: True)
  monkeypatch.setattr(
    blocks_lib, "run_blocks", lambda *arguments: asked.append(arguments[-1])
  )
  learner = types.SimpleNamespace(drafter=None)
  borrowed = types.SimpleNamespace(embedding=None)
  context = [(jnp.zeros((1, 1, 1, 8), jnp.bfloat16),) * 2]
  for wanted in (True, False):
    learner.config = TrainConfig(fused_attention=wanted)
    blocks_lib.BlockLearner.run(learner, {}, borrowed, context, None)
  assert asked == [True, False]
