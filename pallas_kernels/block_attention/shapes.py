"""Shapes of block_attention in real models."""

import jax.numpy as jnp

from pallas_kernels.block_attention.api import block_attention
from pallas_kernels.cases import Case, array

# Model -> (query heads, key/value heads, head width).
MODELS = {
  "smollm2-135m": (9, 3, 64),
  "qwen3-4b": (32, 8, 128),
  "llama31-8b": (32, 8, 128),  # as Qwen3-8B
}
# Model, sequences, new tokens, slots, prefix slots.
CHAINS = (
  ("smollm2-135m", 1, 8, 1024, 0),
  ("smollm2-135m", 8, 16, 8192, 0),
  ("qwen3-4b", 1, 1, 8192, 0),
  ("qwen3-4b", 1, 8, 1024, 0),
  ("qwen3-4b", 1, 16, 32768, 0),
  ("qwen3-4b", 8, 8, 8192, 0),
  ("qwen3-4b", 64, 8, 8192, 0),
  ("llama31-8b", 1, 8, 65536, 0),
  ("llama31-8b", 8, 1, 32768, 0),
  ("llama31-8b", 8, 8, 1024, 8192),
)
TREES = (
  ("smollm2-135m", 1, 64, 8192, 0),
  ("qwen3-4b", 1, 64, 32768, 0),
  ("llama31-8b", 8, 64, 8192, 0),
)
WINDOWED = ("llama31-8b", 8, 8, 32768, 0)
WINDOW = 4096


def cases() -> list[Case]:
  """Chains and trees over caches that are full, one of them with a window."""
  found = [_case(*shape) for shape in CHAINS]
  found += [_case(*shape, tree=True) for shape in TREES]
  return [*found, _case(*WINDOWED, window=WINDOW)]


def _case(
  model: str,
  batch: int,
  tokens: int,
  slots: int,
  prefix: int,
  *,
  tree: bool = False,
  window: int | None = None,
) -> Case:
  N, G, H = MODELS[model]

  def floats(*shape):
    return array(*shape, dtype=jnp.bfloat16)

  new, past = floats(batch, G, tokens, H), floats(batch, G, slots, H)
  query = floats(batch, tokens, N, H)
  full = array(batch, dtype=jnp.int32, low=slots, high=slots)
  operands = [query, new, new, past, past, full]
  if tree:
    # Every row sees the keys before it; what is seen does not change the work.
    words = array(
      batch,
      tokens,
      -(-tokens // 32),
      dtype=jnp.uint32,
      low=2**32 - 1,
      high=2**32 - 1,
    )
    operands.append(words)
  if prefix:
    shared = floats(G, prefix, H)
    operands += [
      shared,
      shared,
      array(dtype=jnp.int32, low=prefix, high=prefix),
    ]

  def call(
    query, key, value, past_key, past_value, length, *more, implementation
  ):
    return block_attention(
      query,
      key,
      value,
      past_key,
      past_value,
      length,
      more[0] if tree else None,
      prefix=more if prefix else None,
      window=window,
      implementation=implementation,
    )

  seen = min(slots, window or slots)
  keys = batch * seen + prefix  # per head; each is read once
  kind = "tree" if tree else "P"
  extra = f" prefix={prefix}" if prefix else ""
  extra += f" window={window}" if window else ""
  return Case(
    name=f"block_attention/{model} B={batch} {kind}={tokens} S={slots}{extra}",
    call=call,
    operands=tuple(operands),
    bytes=2 * 2 * G * keys * H + 2 * batch * tokens * N * H,
    flops=4 * batch * tokens * N * H * (seen + prefix + tokens),
  )
