"""Keys and values of committed tokens, one fixed buffer per layer.

A pass appends the rows of every token it reads; only `commit` makes the first
`count` of them permanent. Rejected rows stay in the buffer past `length`, where
nothing reads them, until the next pass overwrites them. Nobody outside this
file knows the layout.
"""

import dataclasses

import jax
import jax.numpy as jnp


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

  def append(self, layer: int, key: jax.Array, value: jax.Array) -> "KVCache":
    """Writes key, value f[B, T, G, H] of one layer into the uncommitted slots.

    Rows start at each row's own `length`. The caller keeps length + T within
    the capacity: a later start would be moved back, over committed slots.
    """
    keys, values = list(self.keys), list(self.values)
    keys[layer] = _write(keys[layer], key, self.length)
    values[layer] = _write(values[layer], value, self.length)
    return dataclasses.replace(self, keys=tuple(keys), values=tuple(values))

  def read(self, layer: int) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values f[B, G, S, H], uncommitted slots included."""
    return self.keys[layer], self.values[layer]

  def positions(self, count: int) -> jax.Array:
    """i32[B, count]: positions of the next `count` tokens of each row."""
    return self.length[:, None] + jnp.arange(count, dtype=jnp.int32)

  def causal_mask(self, count: int) -> jax.Array:
    """bool[B, count, S]: what each of the next tokens sees, itself included."""
    slots = jnp.arange(self.capacity, dtype=jnp.int32)
    return slots <= self.positions(count)[..., None]

  def tree_mask(self, ancestors: jax.Array) -> jax.Array:
    """bool[B, T, S]: the committed slots, and each row's ancestors and itself.

    Args:
      ancestors: bool[B, T, T], among the T rows appended.
    """
    count = ancestors.shape[1]
    slots = jnp.arange(self.capacity, dtype=jnp.int32)
    place = slots - self.length[:, None]  # [B, S], among the appended rows
    index = jnp.clip(place, 0, count - 1)[:, None]
    related = jnp.take_along_axis(ancestors, index, axis=2)
    appended = (place >= 0) & (place < count)
    return (place < 0)[:, None] | (related & appended[:, None])

  def committed_mask(self) -> jax.Array:
    """bool[B, 1, S]: the committed slots."""
    slots = jnp.arange(self.capacity, dtype=jnp.int32)
    return slots < self.length[:, None, None]

  def commit(
    self, count: jax.Array, path: jax.Array | None = None
  ) -> "KVCache":
    """Makes `count` i32[B] appended slots of each row permanent.

    Args:
      count: the first ones, or the first ones of the path.
      path: i32[B, D + 1], ascending places among the appended slots, which
        move up to lie side by side; None when they do already.
    """
    length = self.length + count
    if path is None:
      return dataclasses.replace(self, length=length)

    def compact(buffer):
      return _move(buffer, self.length, path)

    return KVCache(
      keys=tuple(map(compact, self.keys)),
      values=tuple(map(compact, self.values)),
      length=length,
    )


def _move(buffer: jax.Array, start: jax.Array, path: jax.Array) -> jax.Array:
  """Copies slots start + path of each row to start, start + 1, ..."""

  def move_row(buffer, start, path):
    rows = jnp.take(buffer, start + path, axis=1)
    return jax.lax.dynamic_update_slice(buffer, rows, (0, start, 0))

  if len(start) == 1:  # as in _write
    return move_row(buffer[0], start[0], path[0])[None]
  return jax.vmap(move_row)(buffer, start, path)


def _write(buffer: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
  """Writes rows f[B, T, G, H] into buffer f[B, G, S, H] at start i32[B]."""
  rows = rows.swapaxes(1, 2).astype(buffer.dtype)
  if rows.shape[0] == 1:  # an in-place copy; the batched form is a scatter
    return jax.lax.dynamic_update_slice(buffer, rows, (0, 0, start[0], 0))

  def write_row(buffer, rows, start):
    return jax.lax.dynamic_update_slice(buffer, rows, (0, start, 0))

  return jax.vmap(write_row)(buffer, rows, start)
