"""Shapes of lm_head_verify in real models."""

import jax.numpy as jnp

from pallas_kernels.cases import Case, array
from pallas_kernels.lm_head_verify.api import lm_head_verify
from pallas_kernels.lm_head_verify.row_stats import Draws

# Model -> (width, vocabulary, axis of the vocabulary in the head).
HEADS = {
  "smollm2-135m": (576, 49152, 0),
  "qwen3-4b": (2560, 151936, 0),
  "qwen3-8b": (4096, 151936, 1),
  "llama31-8b": (4096, 128256, 1),
}
ROWS = (1, 16, 32, 64, 128, 512)


def cases() -> list[Case]:
  """Greedy verification of every head; draws and a soft cap of one."""
  found = [_case(model, rows, draws=False) for model in HEADS for rows in ROWS]
  return found + [_case("qwen3-8b", rows, draws=True) for rows in (16, 128)]


def _case(model: str, rows: int, *, draws: bool) -> Case:
  width, vocabulary, axis = HEADS[model]
  head = (vocabulary, width) if axis == 0 else (width, vocabulary)
  operands = [
    array(rows, width, dtype=jnp.bfloat16),
    array(*head, dtype=jnp.bfloat16),
    array(rows, dtype=jnp.int32, high=vocabulary - 1),
  ]
  if draws:
    operands += [array(rows, dtype=jnp.uint32), array(rows, dtype=jnp.int32)]

  def call(hidden, head, tokens, seeds=None, moments=None, *, implementation):
    return lm_head_verify(
      hidden,
      head,
      tokens,
      Draws(seeds, moments, temperature=0.8) if draws else None,
      vocab_axis=axis,
      implementation=implementation,
    )

  return Case(
    name=f"lm_head_verify/{model} M={rows}{' draws' if draws else ''}",
    call=call,
    operands=tuple(operands),
    bytes=2 * width * (vocabulary + rows),
    flops=2 * width * vocabulary * rows,
  )
