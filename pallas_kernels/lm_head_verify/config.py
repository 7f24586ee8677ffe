"""Tiles and budgets of the lm_head_verify kernels."""

import dataclasses

from pallas_kernels.cases import Budget
from pallas_kernels.tuning import tuned

MAX_ROWS = 128  # of one tile; more rows take more tiles
LANES, MAX_COLUMNS = 128, 256  # of an MMA's result
SWAPPED_ROWS = 32  # up to here the vocabulary takes the MMA's long side


@dataclasses.dataclass(frozen=True)
class Config:
  """How a kernel cuts the product.

  Attributes:
    rows: of hidden states per tile, padded.
    swapped: the vocabulary is the long side of the MMA and rows the short one,
      so that few rows are padded to 8 or 16 and not to 64 or 128.
    tile_vocab, tile_width: of the head, per pipeline stage.
    stages: of the pipeline from global to shared memory.
    chunk: columns of the result that Blackwell's epilogue loads at once.
  """

  rows: int
  swapped: bool
  tile_vocab: int
  tile_width: int
  stages: int
  chunk: int


def choose_config(
  architecture: str, num_rows: int, *, draws: bool = False
) -> Config:
  """The configuration for num_rows rows of hidden states, with draws or not.

  Raises:
    ValueError: the device's table of tuned ones is not as it should be.
  """
  swapped = num_rows <= SWAPPED_ROWS
  if swapped:
    # Of a tcgen05 MMA with 128 long rows, the short side comes in sixteens.
    multiple = 8 if architecture == "sm90" else 16
    rows = -(-num_rows // multiple) * multiple
  elif architecture == "sm90" and num_rows <= 64:
    rows = 64
  else:
    rows = MAX_ROWS
  blackwell = architecture == "sm100"
  wide = blackwell and not swapped
  # Three warpgroups have 168 registers a thread. Drawing takes so many of them
  # that only half of the usual logits find room.
  crowded = draws and not blackwell and rows == MAX_ROWS
  config = Config(
    rows=rows,
    swapped=swapped,
    tile_vocab=256 if wide else 64 if crowded else 128,
    tile_width=64,
    stages=4 if wide else 6,
    chunk=32,
  )
  return tuned(
    "lm_head_verify",
    {"rows": rows, "draws": int(draws)},
    config,
    lambda config: find_fault(architecture, config),
  )


def find_fault(architecture: str, config: Config) -> str | None:
  """Why no kernel can have this configuration, if so."""
  budget, vocab = BUDGETS[architecture], config.tile_vocab
  if config.swapped and architecture == "sm100" and vocab != LANES:
    return f"tile_vocab must be {LANES}, the lanes of tensor memory"
  if not 0 < vocab <= MAX_COLUMNS or vocab % 64:
    return f"tile_vocab must be a multiple of 64 up to {MAX_COLUMNS}"
  slot = 2 * config.tile_width * (config.rows + vocab)
  if config.stages < 2 or config.stages * slot > budget.shared_bytes:
    return (
      f"stages must be 2 to {budget.shared_bytes // slot}, as they fit in "
      f"{budget.shared_bytes} bytes"
    )
  return None


# Of one CTA; measured by `make aot`, with a little room.
BUDGETS = {
  "sm90": Budget("HGMMA", registers=240, shared_bytes=227 * 1024),
  "sm100": Budget(
    "UTCHMMA", registers=176, shared_bytes=227 * 1024, tensor_columns=512
  ),
}
