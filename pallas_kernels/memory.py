"""Shared memory in the layout that TMA writes and the tensor cores read."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike):
  """SMEM of tiles whose rows are `shape[-1]` elements, swizzled."""
  bits = jnp.dtype(dtype).itemsize * 8
  swizzle = plgpu.find_swizzle(shape[-1] * bits)
  tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
  return plgpu.SMEM(
    shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle))
  )
