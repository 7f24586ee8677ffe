"""Rows in e4m3, each with a scale of its own."""

import jax
import jax.numpy as jnp
import numpy as np

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # that e4m3 holds
TINY = float(np.finfo(np.float32).tiny)


def quantize_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  """f[M, D] -> e4m3[M, D] and f32[M]; their product is near the rows."""
  rows = rows.astype(jnp.float32)
  scale = jnp.maximum(jnp.abs(rows).max(axis=1) / LARGEST, TINY)
  scaled = jnp.clip(rows / scale[:, None], -LARGEST, LARGEST)
  return scaled.astype(E4M3), scale


def quantize(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
  """kernel f[D, F] -> weight e4m3[F, D] and scale f32[F], for `fp8_matmul`.

  One scale per output channel.
  """
  return quantize_rows(kernel.T)


def rescale(
  product: jax.Array, row_scale: jax.Array, scale: jax.Array
) -> jax.Array:
  """f32[M, F] of the product of e4m3 operands, and both their scales."""
  return product * row_scale[:, None] * scale
