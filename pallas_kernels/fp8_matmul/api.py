"""A few rows times a matrix of e4m3 weights."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.devices import Device
from pallas_kernels.fp8_matmul import kernel_sm90, kernel_sm100, reference
from pallas_kernels.fp8_matmul.config import TILE_WIDTHS, Config, choose_config
from pallas_kernels.fp8_matmul.quantization import (
  E4M3,
  quantize_rows,
  rescale,
)
from pallas_kernels.fp8_matmul.tiles import Work

NAME = "fp8_matmul"
KERNELS = {
  "sm90": kernel_sm90.partial_products,
  "sm100": kernel_sm100.partial_products,
}


def fp8_matmul(
  x: jax.Array,
  weight: jax.Array,
  scale: jax.Array,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """x @ kernel in 8 bits, where (weight, scale) = quantize(kernel).

  Rows of x are rounded to e4m3 as well, each with the scale that makes its
  largest entry 448; products are summed in float32. The output is within about
  2^-3 of sum |x_i kernel_i|, and typically far nearer: each factor is within
  2^-4 of itself, and roundings cancel.

  Args:
    x: f[M, D].
    weight: e4m3[F, D], output channels first.
    scale: f32[F], of the output channels.
    implementation: None for the fastest, or a name in dispatch.IMPLEMENTATIONS.

  Returns:
    f32[M, F].

  Raises:
    ValueError: arguments that no implementation takes.
    NotImplementedError: an implementation that cannot run here, or not on them.
  """
  _check(x, weight, scale)
  chosen, device = dispatch.choose(NAME, implementation, _kernel_limit(weight))
  if chosen == "xla":
    return reference.fp8_matmul(x, weight, scale)
  with jax.named_scope(NAME):
    return run_kernel(chosen, device, x, weight, scale)


def run_kernel(
  architecture: str,
  device: Device,
  x: jax.Array,
  weight: jax.Array,
  scale: jax.Array,
  *,
  config: Config | None = None,
  interpret: object = None,
) -> jax.Array:
  """Rounds and pads rows, runs a kernel, and sums its partial products."""
  M, (F, D) = x.shape[0], weight.shape
  config = config or choose_config(architecture, M, F, D, device.num_cores)
  rows, row_scale = quantize_rows(x)
  missing = -M % config.rows
  work = Work.cut(
    M + missing, weight.shape, config=config, num_ctas=device.num_cores
  )
  rows = jnp.pad(rows, ((0, missing), (0, 0)))
  parts = KERNELS[architecture](work, rows, weight, interpret)
  product = parts.sum(axis=0).T[:M, :F]
  return rescale(product, row_scale, scale)


def _check(x, weight, scale) -> None:
  """Raises ValueError for what nobody could compute."""

  def refuse(what: str):
    raise ValueError(f"{NAME}: {what}")

  if x.ndim != 2 or weight.ndim != 2:
    refuse(f"x {x.shape} and weight {weight.shape} must have 2 axes")
  if x.shape[1] != weight.shape[1]:
    refuse(f"x {x.shape} and weight {weight.shape} differ in width")
  if not x.size or not weight.size:
    refuse(f"x {x.shape} or weight {weight.shape} is empty")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    refuse(f"x is {x.dtype}; use a floating-point type")
  if weight.dtype != E4M3:
    refuse(f"weight is {weight.dtype}; make it with `quantize`")
  if scale.shape != weight.shape[:1]:
    refuse(f"scale {scale.shape} must have an entry per row of {weight.shape}")
  if scale.dtype != jnp.float32:
    refuse(f"scale is {scale.dtype}; use float32")


def _kernel_limit(weight: jax.Array) -> str | None:
  """Why kernels cannot take these weights, if so."""
  F, D = weight.shape
  if F % 8 or D % min(TILE_WIDTHS):
    return (
      f"kernels need weights of 8 n times {min(TILE_WIDTHS)} m, not {F} x {D}"
    )
  return None
