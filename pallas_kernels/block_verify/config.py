"""Chunks and budgets of the block_verify kernels."""

import dataclasses

from pallas_kernels.cases import Budget
from pallas_kernels.tuning import tuned

VECTOR = 4  # numbers that a thread loads at once: 16 bytes
THREADS = 128
CHUNK_STEP = VECTOR * THREADS  # chunks are multiples of it
MAX_CHUNK = 16 * CHUNK_STEP  # more would spill


@dataclasses.dataclass(frozen=True)
class Config:
  """How many tokens of a row a CTA takes.

  All of them are in flight at once, so a chunk is as many as registers can
  hold while several CTAs share a core.

  Attributes:
    measured: of one row, in the first pass.
    compared: of each of two rows, in the second.
    raced: of each of two rows, in the third, which has the most arithmetic and
      the fewest rows.
  """

  measured: int
  compared: int
  raced: int


def choose_config(vocabulary: int) -> Config:
  """The configuration for rows of at least CHUNK_STEP tokens.

  Raises:
    ValueError: the device's table of tuned ones is not as it should be.
  """
  most = vocabulary // CHUNK_STEP * CHUNK_STEP
  config = Config(
    measured=min(4096, most),
    compared=min(2048, most),
    raced=min(1024, most),
  )

  def find_fault(config: Config) -> str | None:
    limit = min(most, MAX_CHUNK)
    for name, size in dataclasses.asdict(config).items():
      if not 0 < size <= limit or size % CHUNK_STEP:
        return f"{name} must be a multiple of {CHUNK_STEP} up to {limit}"
    return None

  return tuned("block_verify", {"vocabulary": vocabulary}, config, find_fault)


# Of one CTA; measured by `make aot`, with a little room.
BUDGETS = {
  "sm90": Budget(None, registers=80, shared_bytes=4096),
  "sm100": Budget(None, registers=80, shared_bytes=4096),
}
