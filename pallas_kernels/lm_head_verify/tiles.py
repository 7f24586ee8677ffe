"""What both kernels share: how the head is cut, how a tile becomes statistics.

A CTA takes every C-th tile of the vocabulary for one tile of rows. Row tiles
are neighbours in the grid, so that those which share a tile of the head find it
in L2.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import noise
from pallas_kernels.lm_head_verify.config import Config
from pallas_kernels.lm_head_verify.row_stats import (
  LOWEST,
  NO_TOKEN,
  Draws,
  Partial,
  fold,
)

FLOATS = ("top", "second", "total", "given", "race")
IDS = ("best", "winner")
NUM_ADDRESSES = 3  # token asked about, seed, moment


@dataclasses.dataclass(frozen=True)
class Work:
  """The product, cut into tiles.

  Attributes:
    config: of the tiles.
    vocab_axis: of the head.
    vocabulary, width: V and D.
    row_tiles: of hidden states.
    ctas: that share the vocabulary, for each tile of rows.
    softcap: of the logits, or None.
    temperature, stream: of the draws; temperature None without draws.
  """

  config: Config
  vocab_axis: int
  vocabulary: int
  width: int
  row_tiles: int
  ctas: int
  softcap: float | None
  temperature: float | None
  stream: int

  @classmethod
  def cut(
    cls,
    num_rows: int,
    head_shape: tuple[int, ...],
    draws: Draws | None,
    *,
    vocab_axis: int,
    softcap: float | None,
    config: Config,
    num_ctas: int,
  ) -> "Work":
    """Cuts num_rows, a multiple of config.rows, times a head."""
    vocabulary, width = head_shape[vocab_axis], head_shape[1 - vocab_axis]
    row_tiles = num_rows // config.rows
    vocab_tiles = pl.cdiv(vocabulary, config.tile_vocab)
    return cls(
      config=config,
      vocab_axis=vocab_axis,
      vocabulary=vocabulary,
      width=width,
      row_tiles=row_tiles,
      ctas=max(1, min(num_ctas // row_tiles, vocab_tiles)),
      softcap=softcap,
      temperature=None if draws is None else draws.temperature,
      stream=0 if draws is None else draws.stream,
    )

  @property
  def steps(self) -> int:
    """Pipeline steps a tile takes."""
    return pl.cdiv(self.width, self.config.tile_width)

  def num_tiles(self, cta: jax.Array) -> jax.Array:
    """How many tiles of the vocabulary a CTA takes."""
    tiles = pl.cdiv(self.vocabulary, self.config.tile_vocab)
    return lax.div(tiles - 1 - cta, self.ctas) + 1

  def first_token(self, cta: jax.Array, tile: jax.Array) -> jax.Array:
    """Where a CTA's tile begins in the vocabulary."""
    return (cta + tile * self.ctas) * self.config.tile_vocab

  def hidden_tile(self, row_tile: jax.Array, step: jax.Array) -> tuple:
    """Of the hidden states: what a step reads."""
    config = self.config
    return (
      pl.ds(row_tile * config.rows, config.rows),
      pl.ds(step * config.tile_width, config.tile_width),
    )

  def head_tile(self, first: jax.Array, step: jax.Array) -> tuple:
    """Of the head: what a step reads of the tile that begins at `first`."""
    config = self.config
    vocab = pl.ds(first, config.tile_vocab)
    width = pl.ds(step * config.tile_width, config.tile_width)
    return (vocab, width) if self.vocab_axis == 0 else (width, vocab)

  @property
  def head_tile_shape(self) -> tuple[int, int]:
    shape = self.config.tile_vocab, self.config.tile_width
    return shape if self.vocab_axis == 0 else shape[::-1]

  def operands(self, hidden, head) -> tuple:
    """The two sides of the MMA whose result is logits_shape."""
    by_vocab = head if self.vocab_axis == 0 else head.T
    if self.config.swapped:
      return by_vocab, hidden.T
    return hidden, by_vocab.T

  def logits_shape(self, rows: int, vocab: int) -> tuple[int, int]:
    return (vocab, rows) if self.config.swapped else (rows, vocab)

  @property
  def logits_vocab_axis(self) -> int:
    return 0 if self.config.swapped else 1

  def out_types(self, num_rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Partial statistics, one row of each kind per CTA."""
    num_floats, num_ids = (5, 2) if self.temperature is not None else (4, 1)
    return (
      jax.ShapeDtypeStruct((num_floats, self.ctas, num_rows), jnp.float32),
      jax.ShapeDtypeStruct((num_ids, self.ctas, num_rows), jnp.int32),
    )


def addresses(tokens: jax.Array, draws: Draws | None) -> jax.Array:
  """i32[3, M]: token asked about, seed and moment of each row."""
  if draws is None:
    return jnp.stack([tokens, tokens * 0, tokens * 0])
  seeds = lax.bitcast_convert_type(draws.seeds, jnp.int32)
  return jnp.stack([tokens, seeds, draws.moments])


def start(work: Work, rows: int, row_layout) -> Partial:
  """Statistics of no logits at all, in registers."""

  def fill(value):
    dtype = jnp.result_type(value)
    return plgpu.layout_cast(jnp.full((rows,), value, dtype), row_layout)

  draws = work.temperature is not None
  return Partial(
    top=fill(LOWEST),
    second=fill(LOWEST),
    total=fill(np.float32(0)),
    best=fill(NO_TOKEN),
    given=fill(np.float32(0)),
    race=fill(LOWEST) if draws else None,
    winner=fill(NO_TOKEN) if draws else None,
  )


def fold_tile(
  work: Work,
  part: Partial,
  logits: jax.Array,
  first: jax.Array,
  address: Callable[[int], jax.Array],
  layout: plgpu.Layout,
) -> Partial:
  """Adds raw logits of the tokens from `first` on.

  Args:
    work: whose logits they are.
    part: statistics so far.
    logits: f32 of work.logits_shape.
    first: i32, the first token of the tile.
    address: index -> that address of each row, i32.
    layout: of the logits in registers.
  """
  axis = work.logits_vocab_axis
  ids = plgpu.broadcasted_iota(jnp.int32, logits.shape, axis, layout=layout)
  ids = ids + first
  if work.softcap is not None:
    logits = work.softcap * jnp.tanh(logits * np.float32(1 / work.softcap))
  is_token = ids < work.vocabulary
  logits = jnp.where(is_token, logits, LOWEST)
  scores = None
  if work.temperature is not None:

    def spread(index):
      rows = address(index)
      return lax.broadcast_in_dim(rows, logits.shape, (1 - axis,))

    times = noise.race_times(
      spread(1).astype(jnp.uint32),
      spread(2).astype(jnp.uint32),
      ids,
      stream=work.stream,
      vocabulary=work.vocabulary,
    )
    scores = logits * np.float32(1 / work.temperature) - jnp.log(times)
    scores = jnp.where(is_token, scores, LOWEST)
  return fold(part, logits, ids, address(0), scores, vocab_axis=axis)


def write(part: Partial, floats, ids, cta: jax.Array, rows) -> None:
  """Leaves a CTA's statistics of some rows in global memory."""
  for index, name in enumerate(FLOATS[: floats.shape[0]]):
    floats[index, cta, rows] = getattr(part, name)
  for index, name in enumerate(IDS[: ids.shape[0]]):
    ids[index, cta, rows] = getattr(part, name)


def read(floats: jax.Array, ids: jax.Array) -> Partial:
  """The kernels' two outputs, by name."""
  race = winner = None
  if floats.shape[0] == len(FLOATS):
    race, winner = floats[4], ids[1]
  top, second, total, given = floats[:4]
  return Partial(top, second, total, ids[0], given, race, winner)
