"""block_attention on Hopper: wgmma fed by TMA, softmax in registers.

Every warpgroup multiplies; the first also asks for the keys of the tiles to
come. A warpgroup for that alone would halve the CTAs that fit a core, and these
hide each other's beginnings and ends.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_attention.config import GROUP_ROWS
from pallas_kernels.block_attention.splits import (
  FLOOR,
  GRID,
  LOWEST,
  WORD,
  Work,
  fill,
  hide,
  logarithm,
  spread,
)
from pallas_kernels.memory import swizzled

LAYOUT = plgpu.Layout.WGMMA
BY_ROW = LAYOUT.reduce(1)
STORED_COLUMNS = 64  # of the result, at once


def attend(
  work: Work,
  query: jax.Array,
  past: tuple[jax.Array, jax.Array],
  block: tuple[jax.Array, jax.Array],
  bounds: jax.Array,
  masks: tuple[jax.Array, jax.Array],
  interpret: object = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention of each split, and the logarithm of its total.

  Args:
    work: how the attention is cut.
    query: bf16[X, R, H], of X = B * G heads.
    past: keys and values bf16[X, S, H] of the cache.
    block: keys and values bf16[X, P, H], P padded to a multiple of 8; any, if
      work.block_keys is 0.
    bounds: i32[B, 2], see Work.span.
    masks: see Work.words; R padded to whole tiles.
    interpret: parameters of the interpreter, for a machine without the device.
  """
  config, H = work.config, work.head_width
  tile_slots, stages = config.tile_slots, config.stages
  groups = config.rows // GROUP_ROWS

  def body(
    query,
    past_key,
    past_value,
    block_key,
    block_value,
    bounds,
    bits,
    oldest,
    out,
    totals,
    query_s,
    key_s,
    value_s,
    weights_s,
    out_s,
    query_loaded,
    key_loaded,
    value_loaded,
    consumed,
  ):
    split, head, row_tile = map(lax.axis_index, GRID)
    group = lax.axis_index("group")
    mine = pl.ds(row_tile * config.rows + group * GROUP_ROWS, GROUP_ROWS)
    span = work.span(split, head, bounds)

    def load(tile):
      slot = lax.rem(tile, stages)
      first = span.start + (span.first_tile + tile) * tile_slots

      def copy(key, value):
        keys = (head, pl.ds(first, tile_slots))
        plgpu.copy_gmem_to_smem(
          key.at[keys], key_s.at[slot], key_loaded.at[slot]
        )
        plgpu.copy_gmem_to_smem(
          value.at[keys], value_s.at[slot], value_loaded.at[slot]
        )

      pl.when(split == work.splits)(lambda: copy(block_key, block_value))
      pl.when(split < work.splits)(lambda: copy(past_key, past_value))

    def refill(tile):
      """Asks for the tile that takes the place of the one before `tile`."""
      following = tile - 1 + stages

      @pl.when((group == 0) & (tile > 0) & (following < span.num_tiles))
      def _():
        plgpu.barrier_wait(consumed.at[lax.rem(following, stages)])
        load(following)

    def multiply(acc, left, right):
      plgpu.wgmma(acc, left, right)
      plgpu.wgmma_wait(0)
      return acc[...]

    def product(left, right, columns):
      return pl.run_scoped(
        functools.partial(multiply, left=left, right=right),
        plgpu.ACC((GROUP_ROWS, columns), jnp.float32),
      )

    def visit(tile, carry, *, masked):
      attended, top, total = carry
      refill(tile)
      slot = lax.rem(tile, stages)
      plgpu.barrier_wait(key_loaded.at[slot])
      scores = product(query_s.at[group], key_s.at[slot].T, tile_slots)
      if masked:
        words = [
          work.words(span, tile, column, head, mine, (bits, oldest), BY_ROW)
          for column in range(0, tile_slots, WORD)
        ]
        scores = hide(scores, words, LAYOUT)
      scale = work.exponent_scale
      new_top = jnp.maximum(top, jnp.max(scores, axis=1) * scale)
      weights = jnp.exp2(scores * scale - spread(new_top, scores.shape))
      keep = jnp.exp2(top - new_top)
      total = total * keep + jnp.sum(weights, axis=1)
      weights_s[group] = weights.astype(weights_s.dtype)
      plgpu.commit_smem()
      plgpu.barrier_wait(value_loaded.at[slot])
      added = product(weights_s.at[group], value_s.at[slot], H)

      @pl.when(tile + stages < span.num_tiles)
      def _():
        plgpu.barrier_arrive(consumed.at[slot])

      attended = attended * spread(keep, attended.shape) + added
      return attended, new_top, total

    @pl.when(span.num_tiles == 0)
    def _nothing():
      totals[split, head, mine] = fill(GROUP_ROWS, LOWEST, BY_ROW)

    @pl.when(span.num_tiles > 0)
    def _attend():
      plgpu.copy_gmem_to_smem(
        query.at[head, mine], query_s.at[group], query_loaded.at[group]
      )

      @pl.when(group == 0)
      def _():
        ahead = lax.min(span.num_tiles, stages)
        lax.fori_loop(0, ahead, lambda tile, _: load(tile), None)

      plgpu.barrier_wait(query_loaded.at[group])
      carry = (
        plgpu.layout_cast(jnp.zeros((GROUP_ROWS, H), jnp.float32), LAYOUT),
        fill(GROUP_ROWS, FLOOR, BY_ROW),
        fill(GROUP_ROWS, 0, BY_ROW),
      )
      for first, last, masked in (
        (0, span.num_full, False),
        (span.num_full, span.num_tiles, True),
      ):
        step = functools.partial(visit, masked=masked)
        carry = lax.fori_loop(first, last, step, carry)
      attended, top, total = carry
      totals[split, head, mine] = logarithm(top, total)
      attended = attended / spread(total, attended.shape)
      for column in range(0, H, STORED_COLUMNS):
        columns = slice(column, column + STORED_COLUMNS)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_s[group] = attended[:, columns]
        plgpu.commit_smem()
        # The copy leaves out rows past the last.
        plgpu.copy_smem_to_gmem(
          out_s.at[group],
          out.at[split, head, mine, pl.ds(column, STORED_COLUMNS)],
        )
      plgpu.wait_smem_to_gmem(0)

  dtype = query.dtype
  kernel = plgpu.kernel(
    body,
    out_type=work.out_types(),
    grid=work.grid,
    grid_names=GRID,
    num_threads=groups,
    thread_name="group",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    scratch_types=dict(
      query_s=swizzled((groups, GROUP_ROWS, H), dtype),
      key_s=swizzled((stages, tile_slots, H), dtype),
      value_s=swizzled((stages, tile_slots, H), dtype),
      weights_s=swizzled((groups, GROUP_ROWS, tile_slots), dtype),
      out_s=swizzled((groups, GROUP_ROWS, STORED_COLUMNS), jnp.float32),
      query_loaded=plgpu.Barrier(num_barriers=groups),
      key_loaded=plgpu.Barrier(num_barriers=stages),
      value_loaded=plgpu.Barrier(num_barriers=stages),
      consumed=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    ),
    interpret=interpret,
  )
  return kernel(query, *past, *block, bounds, *masks)
