"""Chunks and budgets of the block_verify kernels."""

import dataclasses

from pallas_kernels.cases import Budget

VECTOR = 4  # logits that a thread loads at once: 16 bytes
THREADS = 128
CHUNK_STEP = VECTOR * THREADS  # chunks are multiples of it


@dataclasses.dataclass(frozen=True)
class Config:
  """How many logits of a row a CTA takes.

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
  """The configuration for rows of at least CHUNK_STEP logits."""
  most = vocabulary // CHUNK_STEP * CHUNK_STEP
  return Config(
    measured=min(4096, most),
    compared=min(2048, most),
    raced=min(1024, most),
  )


# Of one CTA; measured by `make aot`, with a little room.
BUDGETS = {
  "sm90": Budget(None, registers=80, shared_bytes=4096),
  "sm100": Budget(None, registers=80, shared_bytes=4096),
}
