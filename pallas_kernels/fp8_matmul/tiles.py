"""What both kernels share: who multiplies what.

An item is a tile of features times one split of the width. A CTA takes every
C-th item for one tile of rows, and streams through all of its items without a
pause. Row tiles are neighbours in the grid, so that those which share weights
find them in L2.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.fp8_matmul.config import TILE_FEATURES, Config


@dataclasses.dataclass(frozen=True)
class Work:
  """The product, cut into items.

  Attributes:
    config: of the tiles.
    tiles: of features.
    steps: that an item takes.
    row_tiles: of activations.
    ctas: that share the items, for each tile of rows.
  """

  config: Config
  tiles: int
  steps: int
  row_tiles: int
  ctas: int

  @classmethod
  def cut(
    cls,
    num_rows: int,
    weight_shape: tuple[int, ...],
    *,
    config: Config,
    num_ctas: int,
  ) -> "Work":
    """Cuts num_rows, a multiple of config.rows, times weights [F, D]."""
    features, width = weight_shape
    tiles = pl.cdiv(features, TILE_FEATURES)
    steps, rest = divmod(width, config.tile_width * config.splits)
    assert not rest, (width, config)
    row_tiles = num_rows // config.rows
    items = tiles * config.splits
    return cls(
      config=config,
      tiles=tiles,
      steps=steps,
      row_tiles=row_tiles,
      ctas=max(1, min(num_ctas // row_tiles, items)),
    )

  def num_items(self, cta: jax.Array) -> jax.Array:
    """How many items a CTA takes."""
    return lax.div(self.tiles * self.config.splits - 1 - cta, self.ctas) + 1

  def item(self, cta: jax.Array, index: jax.Array) -> tuple:
    """Tile and split of a CTA's item."""
    item = cta + index * self.ctas
    return lax.div(item, self.config.splits), lax.rem(item, self.config.splits)

  def weight_tile(self, cta, index, step) -> tuple:
    """Of the weights: what a step reads."""
    tile, split = self.item(cta, index)
    features = pl.ds(tile * TILE_FEATURES, TILE_FEATURES)
    return features, self._width(split, step)

  def row_tile(self, row_tile, cta, index, step) -> tuple:
    """Of the activations: what a step reads."""
    _, split = self.item(cta, index)
    return self.rows(row_tile), self._width(split, step)

  def rows(self, row_tile: jax.Array):
    return pl.ds(row_tile * self.config.rows, self.config.rows)

  def _width(self, split, step):
    size = self.config.tile_width
    return pl.ds((split * self.steps + step) * size, size)

  @property
  def out_type(self) -> jax.ShapeDtypeStruct:
    """Partial products, features before rows as the MMA leaves them."""
    features = self.tiles * TILE_FEATURES
    rows = self.row_tiles * self.config.rows
    shape = self.config.splits, features, rows
    return jax.ShapeDtypeStruct(shape, jnp.float32)
