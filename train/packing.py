"""Rows that several sequences share, so that few tokens are padding."""

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.target import Params, Target
from dflash_jax.tree import WORD
from pallas_kernels.block_attention import block_attention


def pack(
  lengths: np.ndarray, capacity: int, most: int
) -> list[tuple[int, ...]]:
  """Fills rows, longest sequences first, each into the fullest that fits it.

  Best-fit decreasing: at most 11/9 of the fewest rows possible, plus four
  (Johnson et al. 1974), where `most` does not bind.

  Args:
    lengths: i64[N], tokens of each sequence; longer ones are cut to a row.
    capacity: S, tokens of a row.
    most: M, sequences of a row.

  Returns:
    Of each row, its sequences by their place in `lengths`.
  """
  rows: list[list[int]] = []
  waiting: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
  has_rows = 0  # bit i: a row with i free tokens waits
  for place in np.argsort(-lengths, kind="stable"):
    needed = min(int(lengths[place]), capacity)
    fits = has_rows >> needed << needed
    if fits:
      free = (fits & -fits).bit_length() - 1
      row = waiting[free].pop()
      if not waiting[free]:
        has_rows &= ~(1 << free)
    else:
      free, row = capacity, len(rows)
      rows.append([])
    rows[row].append(int(place))
    if len(rows[row]) < most:
      waiting[free - needed].append(row)
      has_rows |= 1 << (free - needed)
  return [tuple(row) for row in rows]


def read_packed(
  target: Target,
  params: Params,
  tokens: jax.Array,
  starts: jax.Array,
  taps: tuple[int, ...],
) -> jax.Array:
  """f32[B, S, taps * D]: the target's states, as if documents were alone.

  Args:
    target: the formulas. params: its own.
    tokens: i32[B, S].
    starts: i32[B, S], where each token's document starts in its row.
    taps: layers whose output is wanted, in order.
  """
  B, S = tokens.shape
  cache = target.init_cache(B, 0, params["embedding"].dtype)
  windows = {target.config.window(i) for i in range(target.config.num_layers)}

  def see(window: int | None) -> jax.Array:
    if window is None:
      return see_since(starts)
    return see_since(jnp.maximum(starts, jnp.arange(1, S + 1) - window))

  seen = {window: see(window) for window in windows}

  def attend(layer, query, key, value, sinks):
    past = (*cache.read(layer), cache.length)
    mask = seen[target.config.window(layer)]
    return block_attention(query, key, value, *past, mask, sinks=sinks)

  positions = jnp.arange(S) - starts
  _, states, _ = target.run(
    params, tokens, positions, attend, cache.dtype, taps
  )
  return states


def see_since(starts: jax.Array) -> jax.Array:
  """u32[B, T, W]: row i of starts i32[B, T] sees rows starts[i]..i.

  Packed as dflash_jax.tree.ancestors packs them.
  """
  T = starts.shape[1]

  def below(count: jax.Array) -> jax.Array:
    """All rows before `count` i32[B, T], word by word."""
    first = jnp.arange(0, T, WORD, dtype=jnp.int32)
    bits = jnp.clip(count[..., None] - first, 0, WORD).astype(jnp.uint32)
    some = (jnp.uint32(1) << jnp.minimum(bits, WORD - 1)) - 1
    return jnp.where(bits == WORD, ~jnp.uint32(0), some)

  ends = jnp.broadcast_to(jnp.arange(1, T + 1), starts.shape)
  return below(ends) & ~below(starts)
