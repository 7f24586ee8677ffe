"""lm_head_verify on Blackwell: tcgen05 into tensor memory, reduced by threads.

One warp streams the head and the hidden states through a ring in shared memory,
one issues the MMAs into one of two accumulators in tensor memory, and a
warpgroup folds the other accumulator meanwhile.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lm_head_verify import tiles
from pallas_kernels.lm_head_verify.row_stats import Partial
from pallas_kernels.lm_head_verify.tiles import Work
from pallas_kernels.memory import swizzled

BY_ROW = plgpu.Layout.TCGEN05_TMEM_NATIVE  # a thread owns a row of the result
BY_QUAD = (
  plgpu.Layout.TCGEN05
)  # four threads share a row, for its columns' sums
ISSUE, FOLD = 0, 1  # warpgroups
LOAD_WARP, MMA_WARP = 0, 1  # of the first
BUFFERS = 2  # accumulators


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
  acc_rows, acc_columns = work.logits_shape(config.rows, config.tile_vocab)
  layout = BY_QUAD if config.swapped else BY_ROW
  chunk = min(config.chunk, acc_columns)

  def body(
    hidden, head, *others, hidden_s, head_s, acc, loaded, consumed, done, free
  ):
    addresses, found = others[:num_inputs], others[num_inputs:]
    row_tile, cta = lax.axis_index("rows"), lax.axis_index("cta")
    num_tiles = work.num_tiles(cta)
    all_rows = pl.ds(row_tile * config.rows, config.rows)

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

    def accumulator(tile, first=0, count=acc_columns):
      start = lax.rem(tile, BUFFERS) * acc_columns + first
      return acc.at[:, pl.ds(start, count)]

    def multiply(tile, _):
      buffer = lax.rem(tile, BUFFERS)

      @pl.when(tile >= BUFFERS)
      def _():
        plgpu.barrier_wait(free.at[buffer])

      def step_(step, _):
        slot = lax.rem(tile * steps + step, stages)
        plgpu.barrier_wait(loaded.at[slot])
        left, right = work.operands(hidden_s.at[slot], head_s.at[slot])
        plgpu.tcgen05_mma(
          accumulator(tile),
          left,
          right,
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
          lax.fori_loop(0, num_tiles * steps, load, None)
          drain(consumed, num_tiles * steps, stages)

        @pl.when(warp == MMA_WARP)
        def _():
          lax.fori_loop(0, num_tiles, multiply, None)
          drain(free, num_tiles, BUFFERS)

    @pl.when(lax.axis_index("group") == FOLD)
    def _fold():
      row_layout = layout.reduce(work.logits_vocab_axis)

      def address(index):
        return plgpu.load(
          addresses[0].at[index, all_rows], layout=row_layout, optimized=False
        )

      def visit(tile, part):
        plgpu.barrier_wait(done.at[lax.rem(tile, BUFFERS)])

        def fold_chunk(index, part):
          column = index * chunk
          logits = plgpu.async_load_tmem(
            accumulator(tile, column, chunk), layout=layout
          )
          first = work.first_token(cta, tile)
          first = first if config.swapped else first + column
          return tiles.fold_tile(work, part, logits, first, address, layout)

        # A loop of the program's: unrolled, all loads are hoisted, and spill.
        part = lax.fori_loop(0, acc_columns // chunk, fold_chunk, part)
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(free.at[lax.rem(tile, BUFFERS)])
        return part

      part = tiles.start(work, config.rows, row_layout)
      part = lax.fori_loop(0, num_tiles, visit, part)
      tiles.write(work, part, found, cta, all_rows)

  dtype = head.dtype
  kernel = plgpu.kernel(
    body,
    out_type=work.out_types(),
    grid=(work.ctas, work.row_tiles),
    grid_names=("cta", "rows"),
    num_threads=2,
    thread_name="group",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    scratch_types=dict(
      hidden_s=swizzled((stages, config.rows, config.tile_width), dtype),
      head_s=swizzled((stages, *work.head_tile_shape), dtype),
      acc=plgpu.TMEM((acc_rows, BUFFERS * acc_columns), jnp.float32),
      loaded=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
      consumed=plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
      done=plgpu.Barrier(num_barriers=BUFFERS, orders_tensor_core=True),
      free=plgpu.Barrier(num_barriers=BUFFERS, orders_tensor_core=True),
    ),
    interpret=interpret,
  )
  return tiles.read(work, kernel(hidden, head, *addresses))
