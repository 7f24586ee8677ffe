"""Shapes of block_verify in real models."""

import jax.numpy as jnp

from pallas_kernels.block_verify.api import block_verify
from pallas_kernels.block_verify.rule import Streams
from pallas_kernels.cases import Case, array

VOCABULARIES = {
  "smollm2-135m": 49152,
  "qwen3-8b": 151936,
  "llama31-8b": 128256,
}
STREAMS = Streams(accept=2, recovery=3, bonus=4)
CACHE = 50_000_000  # bytes that stay in the smallest target's L2


def cases() -> list[Case]:
  """Both rules; batches that fit in L2 and that do not."""
  found = [
    _case("qwen3-8b", B, P, rule)
    for rule in ("token", "block")
    for B, P in ((1, 7), (1, 15), (8, 15), (64, 15))
  ]
  found += [_case("smollm2-135m", B, 7, "block") for B in (1, 64)]
  return [*found, _case("llama31-8b", 8, 9, "block")]


def _case(model: str, B: int, P: int, rule: str) -> Case:
  V = VOCABULARIES[model]

  def call(*operands, implementation):
    return block_verify(
      *operands,
      rule=rule,
      temperature=0.8,
      draft_temperature=1.0,
      streams=STREAMS,
      implementation=implementation,
    )

  logits = B * (2 * P + 1) * V
  # P_i needs whole rows before S_i can read them: twice, or once and from L2.
  again = 2 * B * (P - 1) * V if rule == "block" else 0
  cached = 4 * logits <= CACHE
  return Case(
    name=f"block_verify/{model} {rule} B={B} P={P}",
    call=call,
    operands=(
      array(B, P + 1, V, dtype=jnp.float32),
      array(B, P, V, dtype=jnp.float32),
      array(B, P, dtype=jnp.int32, high=V - 1),
      array(B, dtype=jnp.uint32, high=2**32 - 1),
      array(B, dtype=jnp.int32, high=4095),
    ),
    bytes=4 * (logits if cached else logits + again),
    flops=4 * (logits + again),
  )
