"""What training blocks see, in one pass that keeps no scores.

Attention of a row's blocks over its context writes scores [N, A K, S] to memory
and reads them back, several times over, forward and backward: at Qwen3-8B's
shape a quarter of a step. cuDNN's attention (through jax.nn) keeps them on the
chip. It takes one set of keys and one mask, so the blocks' own keys follow the
context's, and a slot's mask opens those of its own block alone.
"""

from typing import Literal

import jax
import jax.numpy as jnp

WIDTHS = range(8, 129, 8)  # of a head, that cuDNN takes forward and backward


def can_fuse(keys: jax.Array) -> bool:
  """Whether cuDNN's attention runs here, on keys f[B, G, S, H] like these."""
  device = jax.devices()[0]
  capability = str(getattr(device, "compute_capability", "0"))
  return (
    device.platform == "gpu"
    and float(capability) >= 8.0
    and keys.dtype == jnp.bfloat16
    and keys.shape[-1] in WIDTHS
  )


def attend_fused(
  query: jax.Array,
  own: tuple[jax.Array, jax.Array],
  context: tuple[jax.Array, jax.Array],
  visible: jax.Array,
  mask: jax.Array,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
  """f32[B*A, K, N, H]: softmax over the context that is visible, and the block.

  Args:
    query: f[B*A, K, N, H], of A blocks a row.
    own: keys and values f[B*A, G, K, H] of the blocks.
    context: keys and values f[B, G, S, H]; operands take their dtype.
    visible: bool[B, A*K, S].
    mask: bool[1, K, K], which slots of its block a slot sees.
    implementation: of jax.nn.dot_product_attention.
  """
  B, T, _ = visible.shape
  K, dtype = query.shape[1], context[0].dtype

  def join(rows: jax.Array, blocks: jax.Array) -> jax.Array:
    blocks = blocks.swapaxes(1, 2).reshape(B, T, *rows.shape[1::2])
    return jnp.concatenate([rows.swapaxes(1, 2), blocks.astype(dtype)], axis=1)

  keys, values = map(join, context, own)
  slots = jnp.arange(T)
  within = mask[0][slots[:, None] % K, slots % K]
  within &= slots[:, None] // K == slots // K
  within = jnp.broadcast_to(within, (B, T, T))
  seen = jnp.concatenate([visible, within], axis=-1)
  out = jax.nn.dot_product_attention(
    query.reshape(B, T, *query.shape[2:]).astype(dtype),
    keys,
    values,
    mask=seen[:, None],
    implementation=implementation,
  )
  return out.reshape(query.shape).astype(jnp.float32)
