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
  NOTHING,
  Draws,
  Partial,
  fold,
)

IDS = ("best", "winner")  # fields of Partial that are i32


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
    asks: whether the logit of a given token is asked for.
    temperature, stream: of the draws; temperature None without draws.
  """

  config: Config
  vocab_axis: int
  vocabulary: int
  width: int
  row_tiles: int
  ctas: int
  softcap: float | None
  asks: bool
  temperature: float | None
  stream: int

  @classmethod
  def cut(
    cls,
    num_rows: int,
    head_shape: tuple[int, ...],
    draws: Draws | None,
    *,
    asks: bool,
    vocab_axis: int,
    softcap: float | None,
    config: Config,
    num_ctas: int,
  ) -> "Work":
    """Cuts num_rows rows times a head."""
    vocabulary, width = head_shape[vocab_axis], head_shape[1 - vocab_axis]
    row_tiles = pl.cdiv(num_rows, config.rows)
    vocab_tiles = pl.cdiv(vocabulary, config.tile_vocab)
    return cls(
      config=config,
      vocab_axis=vocab_axis,
      vocabulary=vocabulary,
      width=width,
      row_tiles=row_tiles,
      ctas=max(1, min(num_ctas // row_tiles, vocab_tiles)),
      softcap=softcap,
      asks=asks,
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

  @property
  def num_rows(self) -> int:
    """Of all tiles."""
    return self.row_tiles * self.config.rows

  @property
  def draws(self) -> bool:
    return self.temperature is not None

  @property
  def fields(self) -> tuple[str, ...]:
    """Of Partial: what is found."""
    asked = ("given",) if self.asks else ()
    drawn = ("race", "winner") if self.draws else ()
    return ("top", "second", "total", "best", *asked, *drawn)

  def out_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of each field, [CTAs, rows]; arrays of their own need no slicing."""
    return tuple(
      jax.ShapeDtypeStruct(
        (self.ctas, self.num_rows), jnp.int32 if name in IDS else jnp.float32
      )
      for name in self.fields
    )


def addresses(
  work: Work, tokens: jax.Array | None, draws: Draws | None
) -> tuple[jax.Array, ...]:
  """(i32[n, num_rows],): seed and moment if rows are drawn, token asked about.

  Nothing at all if there is none of them.
  """
  words = []
  if draws is not None:
    seeds = lax.bitcast_convert_type(draws.seeds, jnp.int32)
    words += [seeds, draws.moments]
  if tokens is not None:
    words.append(tokens)
  if not words:
    return ()
  rows = jnp.stack(words)
  return (jnp.pad(rows, ((0, 0), (0, work.num_rows - rows.shape[1]))),)


def start(work: Work, rows: int, row_layout) -> Partial:
  """Statistics of no logits at all, in registers."""

  def fill(value):
    dtype = jnp.result_type(value)
    return plgpu.layout_cast(jnp.full((rows,), value, dtype), row_layout)

  return Partial(**{name: fill(NOTHING[name]) for name in work.fields})


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
    address: index -> that row of `addresses`, i32.
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

    times = noise.race_times_at(
      spread(0).astype(jnp.uint32),
      spread(1).astype(jnp.uint32),
      ids,
      stream=work.stream,
      vocabulary=work.vocabulary,
    )
    scores = logits * np.float32(1 / work.temperature) - jnp.log(times)
    scores = jnp.where(is_token, scores, LOWEST)
  tokens = address(2 if work.draws else 0) if work.asks else None
  return fold(part, logits, ids, tokens, scores, vocab_axis=axis)


def write(work: Work, part: Partial, found, cta: jax.Array, rows) -> None:
  """Leaves a CTA's statistics of some rows in global memory."""
  for output, name in zip(found, work.fields, strict=True):
    output[cta, rows] = getattr(part, name)


def read(work: Work, found: tuple[jax.Array, ...]) -> Partial:
  """The kernels' outputs, by name."""
  return Partial(**dict(zip(work.fields, found, strict=True)))
