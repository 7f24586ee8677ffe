"""What both kernels share: how keys are split, and which of them a row sees.

A CTA takes one tile of rows of one key/value head, and one split: a fixed
number of slots of the cache, or the new keys of the block. Splits begin at
fixed slots, so what a row gets does not depend on who else is served. Row tiles
are neighbours in the grid, so that those which share keys find them in L2.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_attention.config import Config

WORD = 32  # keys of a word of a mask
LOWEST = np.float32(-1e30)  # below every score, yet finite: it can be scaled
# Below every scaled score, and far above LOWEST scaled: where a row sees no key
# of a tile, weights are 0. LOWEST less a LOWEST that was rounded may be huge.
FLOOR = np.float32(-1e20)
GRID = ("split", "head", "rows")


class Span(NamedTuple):
  """The keys of a CTA, as scalars; tiles are counted from `start` on.

  Attributes:
    is_block: whether they are the block's.
    start: slot of the first key of the split.
    num_keys: of the split that exist; not positive if there are none.
    first_tile, num_tiles: what some row sees.
    num_full: how many of these need no mask; they come first.
  """

  is_block: jax.Array
  start: jax.Array
  num_keys: jax.Array
  first_tile: jax.Array
  num_tiles: jax.Array
  num_full: jax.Array


@dataclasses.dataclass(frozen=True)
class Work:
  """An attention, cut into rows and splits.

  Attributes:
    config: of the tiles.
    heads: key/value heads, of all sequences.
    heads_per_sequence: that share a length and a mask.
    num_rows: of queries per head, a multiple of 8.
    head_width: H.
    splits: of the cache; the block, if any, comes after.
    block_keys: new keys; 0 for a cache alone.
    windowed: whether rows may see the end of the cache only.
    scale: of the scores.
  """

  config: Config
  heads: int
  heads_per_sequence: int
  num_rows: int
  head_width: int
  splits: int
  block_keys: int
  windowed: bool
  scale: float

  @property
  def row_tiles(self) -> int:
    return pl.cdiv(self.num_rows, self.config.rows)

  @property
  def parts(self) -> int:
    """Splits, the block's included."""
    return self.splits + (self.block_keys > 0)

  @property
  def grid(self) -> tuple[int, int, int]:
    """Sizes of the axes in GRID."""
    return self.parts, self.heads, self.row_tiles

  @property
  def exponent_scale(self) -> np.float32:
    """Turns products of queries and keys into exponents of 2."""
    return np.float32(self.scale * math.log2(math.e))

  def out_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Each part's attention, and the logarithm of its softmax's total."""
    padded = self.row_tiles * self.config.rows
    out = (self.parts, self.heads, self.num_rows, self.head_width)
    totals = (self.parts, self.heads, padded)
    return (
      jax.ShapeDtypeStruct(out, jnp.float32),
      jax.ShapeDtypeStruct(totals, jnp.float32),
    )

  def sequence(self, head: jax.Array) -> jax.Array:
    """Whose head it is."""
    return lax.div(head, self.heads_per_sequence)

  def span(self, split: jax.Array, head: jax.Array, bounds) -> Span:
    """The keys of a split.

    Args:
      split, head: the CTA's place in the grid.
      bounds: i32[B, 2] of slots: the first that any row sees, and past the
        last.
    """
    tile, sequence = self.config.tile_slots, self.sequence(head)
    is_block = split == self.splits
    start = jnp.where(is_block, 0, split * self.config.split_slots)
    low = jnp.where(is_block, 0, bounds[sequence, 0])
    high = jnp.where(is_block, self.block_keys, bounds[sequence, 1])
    keys = lax.min(high - start, self.config.split_slots)
    first_tile = lax.div(lax.max(low - start, 0), tile)
    count = lax.max(lax.div(keys + (tile - 1), tile) - first_tile, 0)
    unmasked = jnp.where(is_block, 0, lax.max(lax.div(keys, tile), 0))
    full = 0 if self.windowed else unmasked
    return Span(
      is_block=is_block,
      start=start,
      num_keys=keys,
      first_tile=first_tile,
      num_tiles=count,
      num_full=jnp.asarray(full, jnp.int32),
    )

  def words(
    self, span: Span, tile: jax.Array, column, head, rows, masks, layout
  ) -> jax.Array:
    """i32[rows], a bit for each of 32 keys: whether the row sees it.

    Args:
      span: of the CTA.
      tile, column: where the keys begin; a tile of the span, a column of it.
      head, rows: the queries.
      masks: (bits i32[B, W, R] of the block's keys, oldest i32[B, R] slot that
        a row sees), in global memory.
      layout: of a number per row.
    """
    bits, oldest = masks
    sequence = self.sequence(head)
    key = (span.first_tile + tile) * self.config.tile_slots + column
    index = jnp.where(span.is_block, lax.div(key, WORD), 0)
    seen = plgpu.load(
      bits.at[sequence, index, rows], layout=layout, optimized=False
    )
    exist = jnp.full_like(seen, _low_bits(span.num_keys - key))
    if self.windowed:
      slots = plgpu.load(
        oldest.at[sequence, rows], layout=layout, optimized=False
      )
      exist = exist & ~_low_bits(slots - (span.start + key))
    of_block = jnp.full_like(seen, span.is_block.astype(jnp.int32))
    return jnp.where(of_block != 0, seen, exist)


def _low_bits(count: jax.Array) -> jax.Array:
  """i32 whose lowest bits are set: none for count <= 0, all for >= 32."""
  shift = jnp.clip(count, 0, WORD - 1)
  some = lax.shift_left(count * 0 + 1, shift) - 1
  return jnp.where(count >= WORD, -1, some)


def hide(
  scores: jax.Array, words: list[jax.Array], layout: plgpu.Layout
) -> jax.Array:
  """Scores f32[rows, 32 * len(words)], LOWEST where a row does not see."""
  columns = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=layout)
  word = spread(words[-1], scores.shape)
  for index in reversed(range(len(words) - 1)):
    left = columns < (index + 1) * WORD
    word = jnp.where(left, spread(words[index], scores.shape), word)
  bit = lax.shift_right_logical(word, columns & (WORD - 1)) & 1
  return jnp.where(bit != 0, scores, LOWEST)


def spread(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """A number per row -> the same for all of its columns."""
  return lax.broadcast_in_dim(rows, shape, (0,))


def fill(rows: int, value, layout) -> jax.Array:
  """f32[rows] of one value, in registers."""
  return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), layout)


def logarithm(top: jax.Array, total: jax.Array) -> jax.Array:
  """log2(total * 2**top) of each row; LOWEST where it saw no key."""
  return jnp.where(total > 0, top + jnp.log2(total), LOWEST)
