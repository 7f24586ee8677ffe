"""Shapes of fp8_matmul in real drafters."""

import jax.numpy as jnp

from pallas_kernels.cases import Case, array
from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.fp8_matmul.quantization import E4M3

# Model of the drafter -> its kernels (D, F).
KERNELS = {
  "qwen3-8b": ((4096, 12288), (4096, 4096), (4096, 6144)),
  "smollm2-135m": ((576, 1536), (1536, 576)),
}
ROWS = (1, 16, 32, 128)


def cases() -> list[Case]:
  """Every kernel of every drafter, at every number of rows."""
  return [
    _case(model, *kernel, rows)
    for model, kernels in KERNELS.items()
    for kernel in kernels
    for rows in ROWS
  ]


def _case(model: str, width: int, features: int, rows: int) -> Case:
  return Case(
    name=f"fp8_matmul/{model} {width}x{features} M={rows}",
    call=fp8_matmul,
    operands=(
      array(rows, width, dtype=jnp.bfloat16),
      array(features, width, dtype=E4M3),
      array(features, dtype=jnp.float32),
    ),
    bytes=features * width + rows * (width + 4 * features),
    flops=2 * features * width * rows,
    is_twin=rows != 16 and width != features,
  )
