"""fp8_matmul on Hopper: wgmma fed by TMA, summed in registers.

One warpgroup streams weights and activations through a ring in shared memory,
across items without a pause; two multiply, with half of the features each.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_matmul.config import TILE_FEATURES
from pallas_kernels.fp8_matmul.tiles import Work
from pallas_kernels.memory import swizzled

LAYOUT = plgpu.Layout.WGMMA
GROUPS = 2
GROUP_FEATURES = TILE_FEATURES // GROUPS
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


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

  def body(rows, weight, out, rows_s, weight_s, loaded, consumed):
    row_tile, cta = lax.axis_index("rows"), lax.axis_index("cta")
    group = lax.axis_index("group")
    num_items = work.num_items(cta)

    @pl.when(group == GROUPS)
    def _produce():
      plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

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

      def drain(position, _):
        plgpu.barrier_wait(consumed.at[lax.rem(position, stages)])

      count = num_items * steps
      lax.fori_loop(0, count, load, None)
      # Every completion must be seen before the CTA leaves.
      lax.fori_loop(lax.max(count - stages, 0), count, drain, None)

    @pl.when(group < GROUPS)
    def _consume():
      plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
      first = group * GROUP_FEATURES
      shape = GROUP_FEATURES, config.rows

      def multiply(acc, slot):
        own = weight_s.at[slot, pl.ds(first, GROUP_FEATURES)]
        plgpu.wgmma(acc, own, rows_s.at[slot].T)
        return acc[...]  # once the product is done

      def visit(index, _):
        def step_(step, total):
          slot = lax.rem(index * steps + step, stages)
          plgpu.barrier_wait(loaded.at[slot])
          # Hopper adds products of 8-bit numbers with about 14 bits (DeepSeek,
          # arXiv 2412.19437, section 3.3.2), so that only a step's sum is left
          # to the tensor cores.
          part = pl.run_scoped(
            functools.partial(multiply, slot=slot),
            plgpu.ACC(shape, jnp.float32),
          )
          plgpu.barrier_arrive(consumed.at[slot])
          return total + part

        total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LAYOUT)
        total = lax.fori_loop(0, steps, step_, total)
        tile, split = work.item(cta, index)
        features = pl.ds(tile * TILE_FEATURES + first, GROUP_FEATURES)
        out[split, features, work.rows(row_tile)] = total

      lax.fori_loop(0, num_items, visit, None)

  dtype = weight.dtype
  kernel = plgpu.kernel(
    body,
    out_type=work.out_type,
    grid=(work.ctas, work.row_tiles),
    grid_names=("cta", "rows"),
    num_threads=GROUPS + 1,
    thread_name="group",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    scratch_types=dict(
      rows_s=swizzled((stages, config.rows, config.tile_width), dtype),
      weight_s=swizzled((stages, TILE_FEATURES, config.tile_width), dtype),
      loaded=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      consumed=plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages),
    ),
    interpret=interpret,
  )
  return kernel(rows, weight)
