"""lm_head_verify on Hopper: wgmma fed by TMA, logits reduced in registers.

One warpgroup streams the head and the hidden states through a ring in shared
memory, across tiles without a pause; the others multiply and fold.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lm_head_verify import tiles
from pallas_kernels.lm_head_verify.row_stats import Partial
from pallas_kernels.lm_head_verify.tiles import Work
from pallas_kernels.memory import swizzled

LAYOUT = plgpu.Layout.WGMMA
GROUP_ROWS = 64  # of hidden states per warpgroup, unless swapped
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232


def partial_stats(
  work: Work,
  hidden: jax.Array,
  head: jax.Array,
  addresses: tuple[jax.Array, ...],
  interpret: object = None,
) -> Partial:
  """Statistics [C, M] of the parts of the vocabulary.

  Args:
    work: how the product is cut.
    hidden: bf16[M, D], M a multiple of 8; rows of a tile beyond M are 0.
    head: bf16[V, D], or [D, V] as work.vocab_axis says.
    addresses: of all rows, see tiles.addresses.
    interpret: parameters of the interpreter, for a machine without the device.
  """
  config, steps, stages = work.config, work.steps, work.config.stages
  num_inputs = len(addresses)
  groups = 1 if config.swapped else config.rows // GROUP_ROWS
  rows = config.rows // groups

  def body(hidden, head, *others, hidden_s, head_s, loaded, consumed):
    addresses, found = others[:num_inputs], others[num_inputs:]
    row_tile, cta = lax.axis_index("rows"), lax.axis_index("cta")
    group = lax.axis_index("group")
    num_tiles = work.num_tiles(cta)

    @pl.when(group == groups)
    def _produce():
      plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

      def load(position, _):
        tile, step = lax.div(position, steps), lax.rem(position, steps)
        slot = lax.rem(position, stages)

        @pl.when(position >= stages)
        def _():
          plgpu.barrier_wait(consumed.at[slot])

        plgpu.copy_gmem_to_smem(
          hidden.at[work.hidden_tile(row_tile, step)],
          hidden_s.at[slot],
          loaded.at[slot],
        )
        plgpu.copy_gmem_to_smem(
          head.at[work.head_tile(work.first_token(cta, tile), step)],
          head_s.at[slot],
          loaded.at[slot],
        )

      def drain(position, _):
        plgpu.barrier_wait(consumed.at[lax.rem(position, stages)])

      count = num_tiles * steps
      lax.fori_loop(0, count, load, None)
      # Every completion must be seen before the CTA leaves.
      lax.fori_loop(lax.max(count - stages, 0), count, drain, None)

    @pl.when(group < groups)
    def _consume():
      plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
      row_layout = LAYOUT.reduce(work.logits_vocab_axis)
      mine = pl.ds(row_tile * config.rows + group * rows, rows)

      def address(index):
        return plgpu.load(
          addresses[0].at[index, mine], layout=row_layout, optimized=False
        )

      def multiply(acc, tile):
        def step_(step, _):
          position = tile * steps + step
          slot = lax.rem(position, stages)
          plgpu.barrier_wait(loaded.at[slot])
          own = hidden_s.at[slot, pl.ds(group * rows, rows)]
          plgpu.wgmma(acc, *work.operands(own, head_s.at[slot]))
          plgpu.wgmma_wait(1)

          # The wait has shown that the step before has been read.
          @pl.when(step > 0)
          def _():
            plgpu.barrier_arrive(consumed.at[lax.rem(position - 1, stages)])

        lax.fori_loop(0, steps, step_, None)
        plgpu.wgmma_wait(0)
        last = tile * steps + steps - 1
        plgpu.barrier_arrive(consumed.at[lax.rem(last, stages)])
        return acc[...]

      def visit(tile, part):
        logits = pl.run_scoped(
          functools.partial(multiply, tile=tile),
          plgpu.ACC(work.logits_shape(rows, config.tile_vocab), jnp.float32),
        )
        first = work.first_token(cta, tile)
        return tiles.fold_tile(work, part, logits, first, address, LAYOUT)

      part = tiles.start(work, rows, row_layout)
      part = lax.fori_loop(0, num_tiles, visit, part)
      tiles.write(work, part, found, cta, mine)

  dtype = head.dtype
  kernel = plgpu.kernel(
    body,
    out_type=work.out_types(),
    grid=(work.ctas, work.row_tiles),
    grid_names=("cta", "rows"),
    num_threads=groups + 1,
    thread_name="group",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    scratch_types=dict(
      hidden_s=swizzled((stages, config.rows, config.tile_width), dtype),
      head_s=swizzled((stages, *work.head_tile_shape), dtype),
      loaded=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      consumed=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
    ),
    interpret=interpret,
  )
  return tiles.read(work, kernel(hidden, head, *addresses))
