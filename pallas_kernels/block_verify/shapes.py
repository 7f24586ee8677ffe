"""Shapes of block_verify in real models."""

import jax.numpy as jnp

from pallas_kernels.block_verify.api import block_verify
from pallas_kernels.block_verify.rule import Streams
from pallas_kernels.cases import Case, Operand, array

VOCABULARIES = {
  "smollm2-135m": 49152,
  "qwen3-8b": 151936,
  "llama31-8b": 128256,
}
STREAMS = Streams(accept=2, recovery=3, bonus=4)
CACHE = 50_000_000  # bytes that stay in the smallest target's L2


def cases() -> list[Case]:
  """Both rules; batches that fit in L2 and that do not.

  As the decode loop calls it: the target's logits, the drafter's probabilities;
  of one case, logits of both.
  """
  found = [
    _case("qwen3-8b", B, P, rule)
    for rule in ("token", "block")
    for B, P in ((1, 7), (1, 15), (8, 15), (64, 15))
  ]
  found += [_case("smollm2-135m", B, 7, "block") for B in (1, 64)]
  return [*found, _case("llama31-8b", 8, 9, "block", draft_temperature=1.0)]


def _case(
  model: str,
  B: int,
  P: int,
  rule: str,
  draft_temperature: float | None = None,
) -> Case:
  V = VOCABULARIES[model]

  def call(target, draft, *operands, implementation):
    return block_verify(
      target,
      draft,
      *operands,
      rule=rule,
      temperature=0.8,
      draft_temperature=draft_temperature,
      streams=STREAMS,
      implementation=implementation,
    )

  # All rows of logits; then, for the block rule, P - 1 of either law; then one
  # of either, to draw. What was read before may be in L2.
  measured = P + 1 + (P if draft_temperature else 0)
  again = 2 * (P - 1) if rule == "block" else 0
  drafted = P if draft_temperature else P - 1 if again else 1
  once, read = P + 1 + drafted, measured + again + 2
  is_cached = 4 * B * once * V <= CACHE
  return Case(
    name=f"block_verify/{model} {rule} B={B} P={P}",
    call=call,
    operands=(
      array(B, P + 1, V, dtype=jnp.float32),
      Operand(
        (B, P, V), jnp.dtype(jnp.float32), is_law=draft_temperature is None
      ),
      array(B, P, dtype=jnp.int32, high=V - 1),
      array(B, dtype=jnp.uint32, high=2**32 - 1),
      array(B, dtype=jnp.int32, high=4095),
    ),
    bytes=4 * B * V * (once if is_cached else read),
    flops=4 * B * V * read,
    is_twin=(rule, B) in {("token", 8), ("token", 64), ("block", 64)},
  )
