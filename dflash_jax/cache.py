"""Keys and values of committed tokens, one fixed buffer per layer.

A pass only reads the cache; the rows of the tokens that it read come back
apart, and `extend` writes those that are accepted. So a pass can stand in a
branch of a program without the buffers being copied, and a rejected token
never touches them. Nobody outside this file knows the layout.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Keys and values of the tokens of one pass, f[B, G, T, H] per layer."""

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]

  def follow(self, path: jax.Array) -> "Rows":
    """The rows at path i32[B, D + 1] alone, in its order."""
    index = path[:, None, :, None]
    return jax.tree.map(
      lambda rows: jnp.take_along_axis(rows, index, axis=2), self
    )

  def pad(self, count: int) -> "Rows":
    """With void rows at the end, so that there are `count`."""
    missing = count - self.keys[0].shape[2]
    widths = ((0, 0), (0, 0), (0, missing), (0, 0))
    return jax.tree.map(lambda rows: jnp.pad(rows, widths), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of each layer, and how many slots of a row are committed.

  Attributes:
    keys, values: per layer f[B, G, S, H]; heads before slots, so that a head's
      slots are contiguous for the attention matmul.
    length: i32[B], committed slots, 0..S.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  length: jax.Array

  @classmethod
  def create(
    cls,
    *,
    num_layers: int,
    batch: int,
    num_kv_heads: int,
    capacity: int,
    head_width: int,
    dtype: jnp.dtype,
  ) -> "KVCache":
    """An empty cache of `capacity` slots per row."""
    shape = (batch, num_kv_heads, capacity, head_width)
    return cls(
      keys=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
      values=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
      length=jnp.zeros((batch,), jnp.int32),
    )

  @property
  def capacity(self) -> int:
    """S, slots per row."""
    return self.keys[0].shape[2]

  @property
  def dtype(self) -> jnp.dtype:
    """Of keys and values."""
    return self.keys[0].dtype

  def read(self, layer: int) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values f[B, G, S, H], void slots included."""
    return self.keys[layer], self.values[layer]

  def positions(self, count: int) -> jax.Array:
    """i32[B, count]: positions of the next `count` tokens of each row."""
    return self.length[:, None] + jnp.arange(count, dtype=jnp.int32)

  def committed_mask(self) -> jax.Array:
    """bool[B, 1, S]: the committed slots."""
    slots = jnp.arange(self.capacity, dtype=jnp.int32)
    return slots < self.length[:, None, None]

  def extend(self, rows: Rows, count: jax.Array) -> "KVCache":
    """Commits the first count i32[B] of a pass's rows.

    All T rows are written behind each row's own length, where those past
    `count` lie void until they are overwritten. The caller keeps length + T
    within the capacity: a later start would be moved back, over committed
    slots.
    """

    def write(buffer, new):
      return _write(buffer, new, self.length)

    return KVCache(
      keys=tuple(map(write, self.keys, rows.keys)),
      values=tuple(map(write, self.values, rows.values)),
      length=self.length + count,
    )


def _write(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
  """Writes rows f[B, G, T, H] into buffer f[B, G, S, H] at start i32[B]."""
  rows = rows.astype(buffer.dtype)
  if rows.shape[0] == 1:  # an in-place copy; the batched form is a scatter
    return jax.lax.dynamic_update_slice(buffer, rows, (0, 0, start[0], 0))

  def write_row(buffer, rows, start):
    return jax.lax.dynamic_update_slice(buffer, rows, (0, start, 0))

  return jax.vmap(write_row)(buffer, rows, start)
