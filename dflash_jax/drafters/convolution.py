"""DFlash 2's grouped dynamic convolution over the slots of a block.

y_t[c] = sum over taps of (base[tap, c] + chosen_t[tap, group(c)]) x_{t-tap}[c],
where chosen_t is a projection of the sublayer's normed input; slots before the
block read zero. One stands before and one after each sublayer, and the same
projection serves both.
Source: the DFlash 2 model of package dflash 0.1.0.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax import layers
from dflash_jax.networks import Convolution

SIDES = 2  # before and after the sublayer


class DynamicConvolution(nnx.Module):
  """Both convolutions of one sublayer; at first they change nothing."""

  def __init__(self, config: Convolution, width: int):
    self.taps = config.kernel_size
    self.groups = width // config.group_size
    shape = (SIDES, self.taps, width)
    self.base = nnx.Param(jnp.zeros(shape).at[:, 0].set(1.0))
    chosen = SIDES * self.taps * self.groups
    self.projection_kernel = nnx.Param(jnp.zeros((width, chosen)))

  def kernels(self, normed: jax.Array) -> jax.Array:
    """normed f32[B, K, D] -> f32[2, B, K, taps, D], of either side."""
    B, K, D = normed.shape
    chosen = layers.matmul(normed, self.projection_kernel.get_value())
    chosen = chosen.reshape(B, K, SIDES, self.taps, self.groups)
    spread = jnp.repeat(chosen, D // self.groups, axis=-1)
    kernels = self.base[...].astype(jnp.float32) + spread
    return jnp.moveaxis(kernels, 2, 0)

  @staticmethod
  def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x f32[B, K, D] by f32[B, K, taps, D], looking back within the block."""
    K, taps = x.shape[1], kernel.shape[2]
    past = jnp.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    seen = [past[:, taps - 1 - tap :][:, :K] for tap in range(taps)]
    parts = [kernel[:, :, tap] * rows for tap, rows in enumerate(seen)]
    return sum(parts, start=jnp.zeros_like(x))
