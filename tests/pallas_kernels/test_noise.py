"""Noise in registers: the cipher and the logarithm against other sources."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from dflash_jax.noise import Stream
from pallas_kernels import noise


def test_the_cipher_is_jaxs_own():
  rng = np.random.default_rng(0)
  words = [jnp.array(w) for w in rng.integers(0, 2**32, (4, 1009), np.uint32)]
  found = noise.threefry((words[0], words[1]), (words[2], words[3]))
  for ours, theirs in zip(found, threefry2x32_p.bind(*words), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_kernels_and_plain_code_make_the_same_noise():
  """Up to the rounding of two ways to take a logarithm."""
  seeds, moments, V = jnp.array([3, 2**31 + 5], jnp.uint32), jnp.arange(2), 1031
  want = noise.race_times(Stream.BONUS, seeds, moments, V)
  spread = jnp.zeros((2, V), jnp.uint32)
  found = noise.race_times_at(
    spread + seeds[:, None],
    spread + moments[:, None].astype(jnp.uint32),
    jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (2, V)),
    stream=int(Stream.BONUS),
    vocabulary=V,
  )
  np.testing.assert_allclose(found, want, rtol=1e-6)


def test_times_are_finely_graded_near_zero_and_never_zero():
  bits = jnp.array([0, 1, 2, 2**20, 2**26, 2**31, 2**32 - 1], jnp.uint32)
  found = jax.jit(noise._exponential)(bits)
  u = (np.asarray(bits, np.float64) + 0.5) / 2**32
  want = -np.log1p(-u)
  np.testing.assert_allclose(found[:-1], want[:-1], rtol=1e-6)
  assert found[0] > 0 and np.isinf(found[-1])  # u rounds to 1: never wins
