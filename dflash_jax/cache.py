"""Keys and values of committed tokens, one fixed buffer per layer.

A pass only reads the cache; the rows of the tokens that it read come back
apart, and `extend` writes those that are accepted. So a pass can stand in a
branch of a program without the buffers being copied, and a rejected token
never touches them. Nobody outside this file knows the layout.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pages:
  """A run of consecutive slots: `count` pages of `size` slots each."""

  count: int
  size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """Keys and values of some tokens, per layer.

  Of those of a pass f[B, G, T, H]; of those of a row, cut into pages,
  f[count, G, size, H].
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]

  def follow(self, path: jax.Array) -> "Rows":
    """The rows at path i32[B, D + 1] alone, in its order."""
    index = path[:, None, :, None]
    return jax.tree.map(
      lambda rows: jnp.take_along_axis(rows, index, axis=2), self
    )

  def roll(self, distance: jax.Array) -> "Rows":
    """Of consecutive pages f[count, G, size, H]: slots moved on, around."""

    def move(pages):
      count, G, size, H = pages.shape
      slots = pages.swapaxes(0, 1).reshape(G, count * size, H)
      slots = jnp.roll(slots, distance, axis=1)
      return slots.reshape(G, count, size, H).swapaxes(0, 1)

    return jax.tree.map(move, self)

  def pad(self, count: int) -> "Rows":
    """With void rows at the end, so that there are `count`."""
    missing = count - self.keys[0].shape[2]
    widths = ((0, 0), (0, 0), (0, missing), (0, 0))
    return jax.tree.map(lambda rows: jnp.pad(rows, widths), self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trunk:
  """What several rows begin with, so that attention reads it once for all.

  Attributes:
    keys, values: per layer f[G, S0, H].
    length: i32[], committed slots.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  length: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
  """Keys and values of each layer, and how many tokens of a row are committed.

  Attributes:
    keys, values: per layer f[B, G, S, H]; heads before slots, so that a head's
      slots are contiguous for the attention matmul.
    length: i32[B], committed tokens; those of the trunk and 0..S slots.
    trunk: of the rows that are members; None if there is no such thing.
    member: bool[B]; None without a trunk.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  length: jax.Array
  trunk: Trunk | None = None
  member: jax.Array | None = None

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

  @property
  def own_length(self) -> jax.Array:
    """i32[B], committed slots, behind the trunk."""
    if self.trunk is None or self.member is None:
      return self.length
    return self.length - jnp.where(self.member, self.trunk.length, 0)

  def read(self, layer: int) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values f[B, G, S, H], void slots included."""
    return self.keys[layer], self.values[layer]

  def read_trunk(
    self, layer: int
  ) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    """One layer's keys and values f[G, S0, H] of the trunk, and its length."""
    if self.trunk is None:
      return None
    return self.trunk.keys[layer], self.trunk.values[layer], self.trunk.length

  def positions(self, count: int) -> jax.Array:
    """i32[B, count]: positions of the next `count` tokens of each row."""
    return self.length[:, None] + jnp.arange(count, dtype=jnp.int32)

  def committed_mask(self) -> jax.Array:
    """bool[B, 1, S]: the committed slots."""
    slots = jnp.arange(self.capacity, dtype=jnp.int32)
    return slots < self.own_length[:, None, None]

  def reopen(self, length: jax.Array) -> "KVCache":
    """The same slots, of which the first length i32[B] count as committed."""
    return dataclasses.replace(self, length=length)

  def cut(self, row: jax.Array, start: jax.Array, shape: Pages) -> Rows:
    """Keys and values of some slots of a row, cut into pages.

    Args:
      row: i32[].
      start: i32[], the first token, behind the trunk; the caller keeps all
        within the capacity.
      shape: how many pages, of how many slots.

    Returns:
      f[count, G, size, H] per layer.
    """
    first = start - (self.length - self.own_length)[row]

    def take(buffer):
      _, G, _, H = buffer.shape
      size = (1, G, shape.count * shape.size, H)
      slots = jax.lax.dynamic_slice(buffer, (row, 0, first, 0), size)
      slots = slots.reshape(G, shape.count, shape.size, H)
      return slots.swapaxes(0, 1)

    return Rows(tuple(map(take, self.keys)), tuple(map(take, self.values)))

  def paste(self, row: jax.Array, start: jax.Array, pages: Rows) -> "KVCache":
    """Writes what `cut` took; what counts as committed stays the same."""

    def put(buffer, new):
      count, G, size, H = new.shape
      slots = new.swapaxes(0, 1).reshape(1, G, count * size, H)
      slots = slots.astype(buffer.dtype)
      return jax.lax.dynamic_update_slice(buffer, slots, (row, 0, start, 0))

    return dataclasses.replace(
      self,
      keys=tuple(map(put, self.keys, pages.keys)),
      values=tuple(map(put, self.values, pages.values)),
    )

  def lean(self, trunk: Trunk, member: jax.Array) -> "KVCache":
    """A row of its own as one that begins with a trunk, if it is a member.

    Args:
      trunk: tokens that the row, if a member, has in its first slots.
      member: bool[].
    """
    skipped = jnp.where(member, trunk.length, 0)

    def move(buffer):
      return jnp.roll(buffer, -skipped, axis=2)

    return KVCache(
      keys=tuple(map(move, self.keys)),
      values=tuple(map(move, self.values)),
      length=self.length,
      trunk=trunk,
      member=member[None],
    )

  def extend(self, rows: Rows, count: jax.Array) -> "KVCache":
    """Commits the first count i32[B] of a pass's rows.

    All T rows are written behind each row's own slots, where those past
    `count` lie void until they are overwritten. The caller keeps length + T
    within the capacity: a later start would be moved back, over committed
    slots.
    """

    def write(buffer, new):
      return _write(buffer, new, self.own_length)

    return dataclasses.replace(
      self,
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
