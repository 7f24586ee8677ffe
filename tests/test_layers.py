"""Attention, rotary and matmul against slow references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import layers
from dflash_jax.config import RotaryScaling


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def slow_attention(query, key, value, mask):
  """One query and one head at a time, in float64."""
  B, T, N, H = query.shape
  G = key.shape[1]
  out = np.zeros((B, T, N, H))
  lse = np.zeros((B, T, N))
  for b, t, n in np.ndindex(B, T, N):
    seen = np.flatnonzero(mask[b, t])
    g = n // (N // G)
    scores = key[b, g, seen].astype(np.float64) @ query[b, t, n] / np.sqrt(H)
    weights = np.exp(scores - scores.max())
    out[b, t, n] = weights @ value[b, g, seen] / weights.sum()
    lse[b, t, n] = np.log(weights.sum()) + scores.max()
  return out, lse


@pytest.fixture
def attention():
  B, T, S, N, G, H = 2, 3, 11, 6, 2, 5
  mask = np.random.default_rng(4).random((B, T, S)) < 0.6
  mask[..., 7] = True
  return (
    draw(B, T, N, H),
    draw(B, G, S, H, seed=1),
    draw(B, G, S, H, seed=2),
    mask,
  )


def test_attention_matches_one_query_at_a_time(attention):
  out, lse = layers.attend_with_lse(*map(jnp.asarray, attention))
  expected_out, expected_lse = slow_attention(*attention)
  np.testing.assert_allclose(out, expected_out, atol=1e-5)
  np.testing.assert_allclose(lse, expected_lse, atol=1e-5)


def test_two_parts_merge_into_attention_over_their_union(attention):
  query, key, value, mask = attention
  first, second = mask.copy(), mask.copy()
  first[..., 6:] = False
  second[..., :6] = False
  first[0, 0] = False  # one query sees nothing of the first part
  whole = first | second
  merged = layers.merge_attention(
    layers.attend_with_lse(query, key, value, jnp.asarray(first)),
    layers.attend_with_lse(query, key, value, jnp.asarray(second)),
  )
  expected, _ = slow_attention(query, key, value, whole)
  np.testing.assert_allclose(merged, expected, atol=1e-5)


def test_attention_stays_exact_with_scores_in_the_thousands(attention):
  query, key, value, mask = attention
  out, lse = layers.attend_with_lse(query * 3000, key, value, mask)
  expected_out, expected_lse = slow_attention(query * 3000, key, value, mask)
  np.testing.assert_allclose(out, expected_out, atol=1e-3)
  np.testing.assert_allclose(lse, expected_lse, rtol=1e-5)


def test_a_query_that_sees_nothing_weighs_nothing_in_a_merge(attention):
  query, key, value, mask = attention
  nothing = layers.attend_with_lse(query, key, value, mask & False)
  something = layers.attend_with_lse(query, key, value, mask)
  merged = layers.merge_attention(nothing, something)
  np.testing.assert_array_equal(merged, something[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul_gradients_match_those_of_a_plain_product(dtype):
  x, kernel = jnp.asarray(draw(2, 3, 5)), jnp.asarray(draw(5, 7, seed=1))
  weights = jnp.asarray(draw(2, 3, 7, seed=2))

  def through(product):
    return lambda x, k: (product(x, k) * weights).sum()

  ours = jax.grad(through(layers.matmul), (0, 1))(x, kernel.astype(dtype))
  plain = jax.grad(through(jnp.dot), (0, 1))(x, kernel)
  tolerance = 1e-5 if dtype == "float32" else 5e-2
  assert ours[0].dtype == jnp.float32 and ours[1].dtype == dtype
  for got, expected in zip(ours, plain, strict=True):
    np.testing.assert_allclose(
      got.astype(np.float32), expected, atol=tolerance, rtol=tolerance
    )


def test_rotation_depends_on_distance_alone():
  query, key = draw(1, 1, 1, 8), draw(1, 1, 1, 8, seed=1)

  def score(query_at, key_at):
    def turn(x, position):
      angles = layers.rotary_angles(jnp.array([[position]]), 8, 1e4, None)
      return layers.rotate(jnp.asarray(x), angles)

    return float((turn(query, query_at) * turn(key, key_at)).sum())

  assert score(13, 4) == pytest.approx(score(109, 100), abs=1e-4)
  assert score(13, 4) != pytest.approx(score(13, 5), abs=1e-2)


def test_llama3_scaling_keeps_fast_and_divides_slow_frequencies():
  scaling = RotaryScaling("llama3", factor=8.0, original_length=64)
  plain, _ = layers.rotary_frequencies(16, 1e4, None)
  scaled, factor = layers.rotary_frequencies(16, 1e4, scaling)
  assert factor == 1.0
  assert scaled[0] == plain[0]
  np.testing.assert_allclose(scaled[-1], plain[-1] / 8, rtol=1e-6)
  assert np.all(scaled <= plain) and np.all(scaled >= plain / 8.001)


def test_yarn_scales_cos_and_sin_by_the_papers_factor():
  scaling = RotaryScaling("yarn", factor=4.0, original_length=64)
  _, factor = layers.rotary_frequencies(16, 1e4, scaling)
  assert factor == pytest.approx(0.1 * np.log(4.0) + 1.0)
