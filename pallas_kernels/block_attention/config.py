"""Tiles and budgets of the block_attention kernels."""

import dataclasses

from pallas_kernels.cases import Budget
from pallas_kernels.tuning import tuned

HEAD_WIDTHS = (64, 128)
MAX_TOKENS = 256  # new tokens: their keys fit one split
GROUP_ROWS = 64  # of queries per warpgroup on Hopper


@dataclasses.dataclass(frozen=True)
class Config:
  """How a kernel cuts the rows and the slots.

  Of these, only `rows` may follow from the number of rows: what one row gets
  must not depend on how many there are.

  Attributes:
    rows: of queries per tile, padded.
    tile_slots: keys per pipeline stage.
    split_slots: keys that one CTA takes.
    stages: of the pipeline from global to shared memory.
    chunk: columns that a thread holds at once, where it can choose.
  """

  rows: int
  tile_slots: int
  split_slots: int
  stages: int
  chunk: int = 32


def choose_config(architecture: str, num_rows: int, head_width: int) -> Config:
  """The configuration for num_rows rows of queries per key/value head.

  Raises:
    ValueError: the device's table of tuned ones is not as it should be.
  """
  hopper = architecture == "sm90"
  few = hopper and num_rows <= GROUP_ROWS
  tile_slots = 8192 // head_width if hopper else 64
  # Of 227 KiB, what the queries and results leave; with few rows, of half.
  key_bytes = (128 if hopper and not few else 64) * 1024
  config = Config(
    rows=GROUP_ROWS if few else 128,
    tile_slots=tile_slots,
    split_slots=65536 // head_width,
    stages=key_bytes // (4 * tile_slots * head_width),
  )
  shape = {"head_width": head_width}
  return tuned("block_attention", shape, config, find_fault)


def find_fault(config: Config) -> str | None:
  """Why no kernel can have this configuration, if so."""
  slots, tile = config.split_slots, config.tile_slots
  if slots < MAX_TOKENS or slots % tile:
    return f"split_slots must be a multiple of {tile} from {MAX_TOKENS} on"
  return None


# Of one CTA; measured by `make aot`, with a little room. Blackwell's lets two
# CTAs share a core.
BUDGETS = {
  "sm90": Budget("HGMMA", registers=200, shared_bytes=212 * 1024),
  "sm100": Budget(
    "UTCHMMA", registers=112, shared_bytes=110 * 1024, tensor_columns=256
  ),
}
