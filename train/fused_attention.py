"""What training blocks see, in one pass that keeps no scores.

Attention of a row's blocks over its context writes scores [N, A K, S] to memory
and reads them back, several times over, forward and backward: at Qwen3-8B's
shape a quarter of a step. cuDNN's attention (through jax.nn) keeps them on the
chip. It takes one set of keys and one mask, so the blocks' own keys lie before
the context's, and a slot's mask opens those of its own block alone.

Masks save it no work, only lengths do. So a row's blocks come in groups of
neighbours, each with its own slots and as much of the context as its last
anchor sees: with sorted anchors half of it. All slots of a row at once would
have one another's keys to hide, at Qwen3-8B's shape three quarters of all keys.
"""

from typing import Literal

import jax
import jax.numpy as jnp

WIDTHS = range(8, 129, 8)  # of a head, that cuDNN takes forward and backward
GROUP = 256  # slots that share keys; more would be hidden from each other


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
  B, T, S = visible.shape
  _, K, N, H = query.shape
  dtype = context[0].dtype
  groups, count = divide(T // K, K)
  size = count * K
  void = groups * count - T // K  # blocks that fill up the last group
  S += S % 2

  def cut(blocks: jax.Array) -> jax.Array:
    """f[B*A, K, ...] -> f[B*groups, size, ...]."""
    rows = blocks.reshape(B, T // K, K, *blocks.shape[2:])
    rows = jnp.pad(rows, ((0, 0), (0, void)) + ((0, 0),) * (rows.ndim - 2))
    return rows.reshape(B * groups, size, *blocks.shape[2:])

  # Of each group, how many keys there are at all: its own, and the context.
  visible = visible.reshape(B * T // K, K, -1)
  visible = jnp.pad(visible, ((0, 0), (0, 0), (0, S - visible.shape[2])))
  visible = cut(visible)
  reach = jnp.where(visible, jnp.arange(1, S + 1), 0).max(axis=(1, 2))
  lengths = (size + reach).astype(jnp.int32)
  exists = jnp.arange(size + S) < lengths[:, None]

  def join(rows: jax.Array, blocks: jax.Array) -> jax.Array:
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, S - rows.shape[2]), (0, 0)))
    rows = jnp.repeat(rows.swapaxes(1, 2), groups, axis=0)
    blocks = cut(blocks.swapaxes(1, 2)).astype(dtype)
    # So that keys past the length get no gradient, whatever is left there.
    joined = jnp.concatenate([blocks, rows], axis=1)
    return jnp.where(exists[..., None, None], joined, 0)

  keys, values = map(join, context, own)
  slots = jnp.arange(size)
  within = mask[0][slots[:, None] % K, slots % K]
  within &= slots[:, None] // K == slots // K
  within = jnp.broadcast_to(within, (B * groups, size, size))
  out = jax.nn.dot_product_attention(
    cut(query).astype(dtype),
    keys,
    values,
    mask=jnp.concatenate([within, visible], axis=-1)[:, None],
    key_value_seq_lengths=lengths,
    implementation=implementation,
  )
  out = out.reshape(B, groups * count, K, N, H)[:, : T // K]
  return out.reshape(query.shape).astype(jnp.float32)


def divide(blocks: int, K: int) -> tuple[int, int]:
  """How many groups a row's blocks make, and blocks of each.

  Groups have about GROUP slots, and an even number of them, as cuDNN wants
  masks to have.
  """
  groups = -(-blocks // max(1, GROUP // K))
  count = -(-blocks // groups)
  return groups, count + count * K % 2
