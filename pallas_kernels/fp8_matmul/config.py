"""Tiles, splits and budgets of the fp8_matmul kernels."""

import dataclasses

from jax.experimental import pallas as pl

from pallas_kernels.cases import Budget
from pallas_kernels.tuning import tuned

MAX_ROWS = 128  # of one tile; more rows take more tiles
TILE_FEATURES = 128  # of the output, the MMA's long side
TILE_WIDTHS = (128, 64, 32)  # of the input, per step: a swizzled line's bytes
RING_BYTES = 192 * 1024
MAX_STAGES = 10
ENDING = 2  # steps that writing a partial product costs, about


@dataclasses.dataclass(frozen=True)
class Config:
  """How a kernel cuts the product.

  Attributes:
    rows: of activations per tile, padded; the MMA's short side.
    tile_width: of weights and activations, per step.
    splits: of the width, into equal numbers of steps.
    stages: of the pipeline from global to shared memory.
    chunk: columns of the result that Blackwell's epilogue loads at once.
  """

  rows: int
  tile_width: int
  splits: int
  stages: int
  chunk: int = 32


def choose_config(
  architecture: str, num_rows: int, features: int, width: int, num_cores: int
) -> Config:
  """The configuration for [num_rows, width] times [width, features].

  The splits do not depend on the rows, so neither does a row's result on the
  rows beside it.
  """
  # tcgen05 with 128 features takes rows by 16, wgmma by 8.
  multiple = 16 if architecture == "sm100" else 8
  rows = min(pl.cdiv(num_rows, multiple) * multiple, MAX_ROWS)
  # TMA takes whole tiles only.
  tile_width = next(n for n in TILE_WIDTHS if width % n == 0)
  stage_bytes = (TILE_FEATURES + rows) * tile_width
  steps = width // tile_width
  config = Config(
    rows=rows,
    tile_width=tile_width,
    splits=choose_splits(features, steps, num_cores),
    stages=min(RING_BYTES // stage_bytes, MAX_STAGES),
  )

  def find_fault(config: Config) -> str | None:
    if not config.splits or steps % config.splits:
      return f"splits must divide the {steps} steps of the width"
    return None

  shape = {"features": features, "width": width}
  return tuned("fp8_matmul", shape, config, find_fault)


def choose_splits(features: int, steps: int, num_cores: int) -> int:
  """How many CTAs share a tile of features, to keep all cores busy."""
  tiles = pl.cdiv(features, TILE_FEATURES)

  def cost(splits: int) -> int:
    rounds = pl.cdiv(tiles * splits, num_cores)
    return rounds * (steps // splits + ENDING)

  return min((n for n in range(1, steps + 1) if steps % n == 0), key=cost)


def resident_bytes(*kernels: tuple[int, int]) -> int:
  """Bytes of quantised kernels (D, F): those that fit in L2 may stay there.

  devices.cache_bytes is what to compare with.
  """
  return sum(width * features + 4 * features for width, features in kernels)


# Of one CTA; measured by `make aot`, with a little room.
BUDGETS = {
  "sm90": Budget("QGMMA", registers=168, shared_bytes=RING_BYTES),
  "sm100": Budget(
    "UTCQMMA", registers=96, shared_bytes=RING_BYTES, tensor_columns=256
  ),
}
