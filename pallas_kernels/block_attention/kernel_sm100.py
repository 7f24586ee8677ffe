"""block_attention on Blackwell: tcgen05, scores and sums in tensor memory.

One warp streams keys and values through rings in shared memory, one issues the
MMAs, and a warpgroup, a row per thread, turns scores into weights. A CTA takes
half of a core's memories, so that two hide each other's waits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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

LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE  # a thread owns a row
BY_ROW = LAYOUT.reduce(1)
ISSUE, FOLD = 0, 1  # warpgroups
LOAD_WARP, MMA_WARP = 0, 1  # of the first
STORED_COLUMNS = 16  # of the result, at once
# How far, in powers of 2, weights may exceed 1 before the sums are scaled
# anew: that is a round trip of all of them through registers.
SLACK = np.float32(8)


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
  rows, chunk = config.rows, config.chunk
  tile_slots, stages = config.tile_slots, config.stages

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
    out_s,
    scores_t,
    weights_t,
    sums_t,
    query_loaded,
    key_loaded,
    value_loaded,
    key_free,
    value_free,
    scored,
    scores_free,
    weighed,
    summed,
  ):
    split, head, row_tile = map(lax.axis_index, GRID)
    mine = pl.ds(row_tile * rows, rows)
    span = work.span(split, head, bounds)

    def load(tile, _):
      slot = lax.rem(tile, stages)
      first = span.start + (span.first_tile + tile) * tile_slots

      def refill(of_block, of_past, target, loaded, free):
        @pl.when(tile >= stages)
        def _():
          plgpu.barrier_wait(free.at[slot])

        def copy(source):
          plgpu.copy_gmem_to_smem(
            source.at[head, pl.ds(first, tile_slots)],
            target.at[slot],
            loaded.at[slot],
          )

        pl.when(split == work.splits)(lambda: copy(of_block))
        pl.when(split < work.splits)(lambda: copy(of_past))

      refill(block_key, past_key, key_s, key_loaded, key_free)
      refill(block_value, past_value, value_s, value_loaded, value_free)

    def drain(tile, _):
      """Every completion must be seen before the CTA leaves."""
      plgpu.barrier_wait(key_free.at[lax.rem(tile, stages)])
      plgpu.barrier_wait(value_free.at[lax.rem(tile, stages)])

    def score(tile):
      slot = lax.rem(tile, stages)
      plgpu.barrier_wait(key_loaded.at[slot])
      plgpu.tcgen05_mma(
        scores_t, query_s, key_s.at[slot].T, key_free.at[slot], accumulate=False
      )
      plgpu.tcgen05_commit_arrive(scored)

    def add_up(tile, _):
      slot = lax.rem(tile, stages)

      @pl.when(tile + 1 < span.num_tiles)
      def _():
        plgpu.barrier_wait(scores_free)
        score(tile + 1)

      plgpu.barrier_wait(value_loaded.at[slot])
      plgpu.barrier_wait(weighed)
      plgpu.tcgen05_mma(
        sums_t,
        weights_t,
        value_s.at[slot],
        value_free.at[slot],
        accumulate=tile > 0,
      )
      plgpu.tcgen05_commit_arrive(summed)

    @pl.when((lax.axis_index("group") == ISSUE) & (span.num_tiles > 0))
    def _issue():
      @plgpu.warp_map
      def _(warp):
        @pl.when(warp == LOAD_WARP)
        def _():
          plgpu.copy_gmem_to_smem(query.at[head, mine], query_s, query_loaded)
          lax.fori_loop(0, span.num_tiles, load, None)
          lax.fori_loop(
            lax.max(span.num_tiles - stages, 0), span.num_tiles, drain, None
          )

        @pl.when(warp == MMA_WARP)
        def _():
          plgpu.barrier_wait(query_loaded)
          score(0)
          lax.fori_loop(0, span.num_tiles, add_up, None)

    def scores_of(tile, column, *, masked):
      scores = plgpu.async_load_tmem(
        scores_t.at[:, pl.ds(column, chunk)], layout=LAYOUT
      )
      if not masked:
        return scores
      words = [
        work.words(
          span, tile, column + offset, head, mine, (bits, oldest), BY_ROW
        )
        for offset in range(0, chunk, WORD)
      ]
      return hide(scores, words, LAYOUT)

    def rescale(factor):
      def visit(index, _):
        columns = sums_t.at[:, pl.ds(index * chunk, chunk)]
        sums = plgpu.async_load_tmem(columns, layout=LAYOUT)
        sums = sums * spread(factor, sums.shape)
        plgpu.wait_load_tmem()
        plgpu.async_store_tmem(columns, sums)

      # Loops in the program: unrolled, all loads would be hoisted, and spill.
      lax.fori_loop(0, H // chunk, visit, None)

    def visit(tile, carry, *, masked):
      top, total = carry
      scale = work.exponent_scale
      plgpu.barrier_wait(scored)

      def find_top(index, found):
        scores = scores_of(tile, index * chunk, masked=masked)
        return jnp.maximum(found, jnp.max(scores, axis=1))

      found = fill(rows, LOWEST, BY_ROW)
      found = lax.fori_loop(0, tile_slots // chunk, find_top, found) * scale
      grows = found > top + SLACK
      new_top = jnp.where(grows, found, top)
      keep = jnp.exp2(top - new_top)
      any_grows = jnp.max(jnp.where(grows, np.float32(1), np.float32(0))) > 0

      # The MMA before has read the weights, and left the sums.
      @pl.when(tile > 0)
      def _():
        plgpu.barrier_wait(summed)

      def weigh(index, total):
        column = index * chunk
        scores = scores_of(tile, column, masked=masked)
        weights = jnp.exp2(scores * scale - spread(new_top, scores.shape))
        plgpu.async_store_tmem(
          weights_t.at[:, pl.ds(column, chunk)],
          weights.astype(weights_t.dtype),
        )
        return total + jnp.sum(weights, axis=1)

      total = lax.fori_loop(0, tile_slots // chunk, weigh, total * keep)
      plgpu.wait_load_tmem()

      @pl.when(tile + 1 < span.num_tiles)
      def _():
        plgpu.barrier_arrive(scores_free)

      pl.when((tile > 0) & any_grows)(lambda: rescale(keep))
      plgpu.commit_tmem()
      plgpu.barrier_arrive(weighed)
      return new_top, total

    @pl.when((lax.axis_index("group") == FOLD) & (span.num_tiles == 0))
    def _nothing():
      totals[split, head, mine] = fill(rows, LOWEST, BY_ROW)

    @pl.when((lax.axis_index("group") == FOLD) & (span.num_tiles > 0))
    def _fold():
      carry = fill(rows, FLOOR, BY_ROW), fill(rows, 0, BY_ROW)
      for first, last, masked in (
        (0, span.num_full, False),
        (span.num_full, span.num_tiles, True),
      ):
        step = functools.partial(visit, masked=masked)
        carry = lax.fori_loop(first, last, step, carry)
      top, total = carry
      totals[split, head, mine] = logarithm(top, total)
      plgpu.barrier_wait(summed)

      def store(index, _):
        columns = pl.ds(index * STORED_COLUMNS, STORED_COLUMNS)
        sums = plgpu.async_load_tmem(sums_t.at[:, columns], layout=LAYOUT)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        out_s[...] = sums / spread(total, sums.shape)
        plgpu.commit_smem()
        # The copy leaves out rows past the last.
        plgpu.copy_smem_to_gmem(out_s, out.at[split, head, mine, columns])

      lax.fori_loop(0, H // STORED_COLUMNS, store, None)
      plgpu.wait_load_tmem()
      plgpu.wait_smem_to_gmem(0)

  dtype = query.dtype
  of_tensor_core = functools.partial(plgpu.Barrier, orders_tensor_core=True)
  kernel = plgpu.kernel(
    body,
    out_type=work.out_types(),
    grid=work.grid,
    grid_names=GRID,
    num_threads=2,
    thread_name="group",
    compiler_params=plgpu.CompilerParams(
      approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    scratch_types=dict(
      query_s=swizzled((rows, H), dtype),
      key_s=swizzled((stages, tile_slots, H), dtype),
      value_s=swizzled((stages, tile_slots, H), dtype),
      out_s=swizzled((rows, STORED_COLUMNS), jnp.float32),
      scores_t=plgpu.TMEM((rows, tile_slots), jnp.float32),
      weights_t=plgpu.TMEM((rows, tile_slots), dtype, packed=True),
      sums_t=plgpu.TMEM((rows, H), jnp.float32),
      query_loaded=plgpu.Barrier(),
      key_loaded=plgpu.Barrier(num_barriers=stages),
      value_loaded=plgpu.Barrier(num_barriers=stages),
      key_free=of_tensor_core(num_barriers=stages),
      value_free=of_tensor_core(num_barriers=stages),
      scored=of_tensor_core(),
      scores_free=of_tensor_core(),
      weighed=of_tensor_core(),
      summed=of_tensor_core(),
    ),
    interpret=interpret,
  )
  return kernel(query, *past, *block, bounds, *masks)
