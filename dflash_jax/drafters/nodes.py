"""The tokens a round has drafted so far, and what each of them sees.

Their keys and values are transient: of a round's nodes only some are accepted,
and `absorb` reads those again with all that the target has said of them.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dflash_jax.cache import KVCache, Rows
from dflash_jax.layers import apply_sinks, attend_with_lse, merge_attention

# (layer, query f32[B, W, N, H], keys and values f[B, G, W, H] of the nodes that
# ask) -> f32[B, W, N, H].
Attention = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def gather(rows: jax.Array, parents: jax.Array) -> jax.Array:
  """rows [B, W, ...] -> [B, W', ...], those of parents i32[B, W']."""
  index = parents.reshape(*parents.shape, *[1] * (rows.ndim - 2))
  return jnp.take_along_axis(rows, index, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nodes:
  """N nodes, of which the last W are the newest depth.

  Attributes:
    keys, values: per layer f[B, G, N, H].
    seen: bool[B, W, N], the ancestors of each of the newest, and itself.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  seen: jax.Array

  @classmethod
  def before(cls, cache: KVCache) -> "Nodes":
    """None yet; one void node stands for all that is above the anchor."""
    num_layers = len(cache.keys)
    empty = cache.keys[0][:, :, :0]
    seen = jnp.zeros((empty.shape[0], 1, 0), bool)
    return cls((empty,) * num_layers, (empty,) * num_layers, seen)

  def below(self, parents: jax.Array) -> jax.Array:
    """bool[B, W', N + W']: what the next W' nodes see, themselves at the end.

    Args:
      parents: i32[B, W'], which of the newest each continues.
    """
    B, W = parents.shape
    own = jnp.broadcast_to(jnp.eye(W, dtype=bool), (B, W, W))
    return jnp.concatenate([gather(self.seen, parents), own], axis=-1)

  def add(self, rows: Rows, seen: jax.Array) -> "Nodes":
    """With the keys and values of the next depth, and what it sees."""
    return Nodes(
      keys=tuple(map(_join, self.keys, rows.keys)),
      values=tuple(map(_join, self.values, rows.values)),
      seen=seen,
    )

  def attend(
    self,
    cache: KVCache,
    seen: jax.Array,
    layer: int,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sinks: jax.Array | None = None,
    oldest: jax.Array | None = None,
  ) -> jax.Array:
    """Attention of the next depth: committed tokens, ancestors, itself.

    Args:
      cache: of committed tokens.
      seen: of `below`.
      layer: whose keys and values are read.
      query: f32[B, W', N, H]. key, value: f[B, G, W', H].
      sinks: f[N], or None.
      oldest: i32[B], the first committed slot that is seen; None for all.

    Returns:
      f32[B, W', N, H].
    """
    keys = _join(self.keys[layer], key)
    values = _join(self.values[layer], value)
    own = attend_with_lse(query, keys, values, seen)
    mask = cache.committed_mask()
    if oldest is not None:
      mask &= jnp.arange(cache.capacity) >= oldest[:, None, None]
    past = attend_with_lse(query, *cache.read(layer), mask)
    merged = merge_attention(past, own)
    if sinks is None:
      return merged
    return apply_sinks(merged, jnp.logaddexp(past[1], own[1]), sinks)


def attend_chains(
  chains: list[Rows],
  mask: jax.Array,
  layer: int,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
) -> jax.Array:
  """Attention of one more step of chains that leave a text at C of its T rows.

  A chain sees step 0 as the mask says, and itself in the steps since.

  Args:
    chains: keys and values of the steps before, f[B, G, C, H] per layer; of
      step 0, of the whole text, f[B, G, T, H].
    mask: bool[B, C, T], of step 0.
    layer, query, key, value: as `Nodes.attend` takes them, W' being C.
  """
  if not chains:
    return attend_with_lse(query, key, value, mask)[0]
  first = chains[0]
  context = attend_with_lse(query, first.keys[layer], first.values[layer], mask)
  keys = [rows.keys[layer] for rows in chains[1:]] + [key]
  values = [rows.values[layer] for rows in chains[1:]] + [value]

  def by_row(parts: list[jax.Array]) -> jax.Array:
    """f[B, G, T, H] per step -> f[B * T, G, steps, H]."""
    B, G, T, H = parts[0].shape
    stacked = jnp.stack(parts, axis=3).swapaxes(1, 2)
    return stacked.reshape(B * T, G, len(parts), H)

  B, T, N, H = query.shape
  own, lse = attend_with_lse(
    query.reshape(B * T, 1, N, H),
    by_row(keys),
    by_row(values),
    jnp.ones((1, 1, len(keys)), bool),
  )
  chain = own.reshape(query.shape), lse.reshape(B, T, N)
  return merge_attention(context, chain)


def _join(first: jax.Array, second: jax.Array) -> jax.Array:
  return jnp.concatenate([first, second], axis=2)
