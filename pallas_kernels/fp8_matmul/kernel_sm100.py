"""fp8_matmul on Blackwell: tcgen05 into tensor memory.

One warp streams weights and activations through a ring in shared memory, one
issues the MMAs into one of two accumulators in tensor memory, and a warpgroup
writes the other accumulator out meanwhile.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_matmul.config import TILE_FEATURES
from pallas_kernels.fp8_matmul.tiles import Work
from pallas_kernels.memory import swizzled

BY_FEATURE = plgpu.Layout.TCGEN05_TMEM_NATIVE  # a thread owns one
ISSUE, WRITE = 0, 1  # warpgroups
LOAD_WARP, MMA_WARP = 0, 1  # of the first
BUFFERS = 2  # accumulators


def partial_products(
  work: Work, rows: jax.Array, weight: jax.Array, interpret: object = None
) -> jax.Array:
  """f32[splits, F', M] of the splits of the width, F' whole tiles.

  Args:
    work: how the product is cut.
    rows: e4m3[M, D], M a multiple of work.config.rows.
    weight: e4m3[F, D].
    interpret: parameters of the interpreter, for a machine without the device.
  """
  config, steps, stages = work.config, work.steps, work.config.stages
  columns = config.rows
  chunk = math.gcd(config.chunk, columns)

  def body(
    rows, weight, out, rows_s, weight_s, acc, loaded, consumed, done, free
  ):
    row_tile, cta = lax.axis_index("rows"), lax.axis_index("cta")
    num_items = work.num_items(cta)

    def load(position, _):
      index, step = lax.div(position, steps), lax.rem(position, steps)
      slot = lax.rem(position, stages)

      @pl.when(position >= stages)
      def _():
        plgpu.barrier_wait(consumed.at[slot])

      plgpu.copy_gmem_to_smem(
        weight.at[work.weight_tile(cta, index, step)],
        weight_s.at[slot],
        loaded.at[slot],
      )
      plgpu.copy_gmem_to_smem(
        rows.at[work.row_tile(row_tile, cta, index, step)],
        rows_s.at[slot],
        loaded.at[slot],
      )

    def accumulator(index, first=0, count=columns):
      start = lax.rem(index, BUFFERS) * columns + first
      return acc.at[:, pl.ds(start, count)]

    def multiply(index, _):
      buffer = lax.rem(index, BUFFERS)

      @pl.when(index >= BUFFERS)
      def _():
        plgpu.barrier_wait(free.at[buffer])

      def step_(step, _):
        slot = lax.rem(index * steps + step, stages)
        plgpu.barrier_wait(loaded.at[slot])
        plgpu.tcgen05_mma(
          accumulator(index),
          weight_s.at[slot],
          rows_s.at[slot].T,
          consumed.at[slot],
          accumulate=step > 0,
        )

      lax.fori_loop(0, steps, step_, None)
      plgpu.tcgen05_commit_arrive(done.at[buffer])

    def drain(barrier, count, slots):
      """Every completion must be seen before the CTA leaves."""

      def wait(position, _):
        plgpu.barrier_wait(barrier.at[lax.rem(position, slots)])

      lax.fori_loop(lax.max(count - slots, 0), count, wait, None)

    @pl.when(lax.axis_index("group") == ISSUE)
    def _issue():
      @plgpu.warp_map
      def _(warp):
        @pl.when(warp == LOAD_WARP)
        def _():
          lax.fori_loop(0, num_items * steps, load, None)
          drain(consumed, num_items * steps, stages)

        @pl.when(warp == MMA_WARP)
        def _():
          lax.fori_loop(0, num_items, multiply, None)
          drain(free, num_items, BUFFERS)

    @pl.when(lax.axis_index("group") == WRITE)
    def _write():
      def visit(index, _):
        plgpu.barrier_wait(done.at[lax.rem(index, BUFFERS)])
        tile, split = work.item(cta, index)
        features = pl.ds(tile * TILE_FEATURES, TILE_FEATURES)

        def write_chunk(number, _):
          first = number * chunk
          product = plgpu.async_load_tmem(
            accumulator(index, first, chunk), layout=BY_FEATURE
          )
          first = row_tile * config.rows + first
          out[split, features, pl.ds(first, chunk)] = product

        # Not unrolled here: all loads would be hoisted, and spill.
        lax.fori_loop(0, columns // chunk, write_chunk, None)
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(free.at[lax.rem(index, BUFFERS)])

      lax.fori_loop(0, num_items, visit, None)

  dtype = weight.dtype
  kernel = plgpu.kernel(
    body,
    out_type=work.out_type,
    grid=(work.ctas, work.row_tiles),
    grid_names=("cta", "rows"),
    num_threads=2,
    thread_name="group",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    scratch_types=dict(
      rows_s=swizzled((stages, config.rows, config.tile_width), dtype),
      weight_s=swizzled((stages, TILE_FEATURES, config.tile_width), dtype),
      acc=plgpu.TMEM((TILE_FEATURES, BUFFERS * columns), jnp.float32),
      loaded=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      consumed=plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
      done=plgpu.Barrier(num_barriers=BUFFERS, orders_tensor_core=True),
      free=plgpu.Barrier(num_barriers=BUFFERS, orders_tensor_core=True),
    ),
    interpret=interpret,
  )
  return kernel(rows, weight)
