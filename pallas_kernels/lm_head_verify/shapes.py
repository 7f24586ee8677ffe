"""Shapes of lm_head_verify in real models."""

import jax.numpy as jnp

from pallas_kernels.cases import Case, array
from pallas_kernels.lm_head_verify.api import lm_head_verify
from pallas_kernels.lm_head_verify.config import MAX_ROWS
from pallas_kernels.lm_head_verify.row_stats import Draws

# Model -> (width, vocabulary, axis of the vocabulary in the head).
HEADS = {
  "smollm2-135m": (576, 49152, 0),
  "qwen3-4b": (2560, 151936, 0),
  "qwen3-8b": (4096, 151936, 1),
  "llama31-8b": (4096, 128256, 1),
}
ROWS = (1, 16, 32, 64, 128, 512)
WHOLE = "qwen3-8b"  # whose every number of rows is compiled ahead


def cases() -> list[Case]:
  """Greedy verification of every head; draws, and given tokens, of one."""
  found = [_case(model, rows) for model in HEADS for rows in ROWS]
  found += [_case("qwen3-8b", rows, draws=True) for rows in (16, 128)]
  return [*found, _case("qwen3-8b", 16, asks=True)]


def _case(
  model: str, rows: int, *, draws: bool = False, asks: bool = False
) -> Case:
  width, vocabulary, axis = HEADS[model]
  head = (vocabulary, width) if axis == 0 else (width, vocabulary)
  operands = [
    array(rows, width, dtype=jnp.bfloat16),
    array(*head, dtype=jnp.bfloat16),
  ]
  if asks:
    operands.append(array(rows, dtype=jnp.int32, high=vocabulary - 1))
  if draws:
    operands += [array(rows, dtype=jnp.uint32), array(rows, dtype=jnp.int32)]

  def call(hidden, head, *rest, implementation):
    tokens, drawn = rest[0] if asks else None, None
    if draws:
      drawn = Draws(seeds=rest[0], moments=rest[1], temperature=0.8)
    return lm_head_verify(
      hidden,
      head,
      tokens,
      drawn,
      vocab_axis=axis,
      implementation=implementation,
    )

  return Case(
    name=f"lm_head_verify/{model} M={rows}"
    f"{' draws' if draws else ' asked' if asks else ''}",
    call=call,
    operands=tuple(operands),
    bytes=2 * width * (vocabulary + rows),
    flops=2 * width * vocabulary * rows,
    is_twin=rows > MAX_ROWS or (model != WHOLE and rows not in (16, 128)),
  )
