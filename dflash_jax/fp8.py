"""Kernels in 8 bits: e4m3 values, with a scale for each output channel.

Every round reads the whole drafter. At a byte a weight that is half of what
bfloat16 asks of the memory, and a GPU's L2 cache holds twice the drafter. Rows
of activations are rounded too, each with a scale of its own, as tensor cores
multiply 8 bits by 8 bits:

    y[m, f] = row_scale[m] scale[f] sum over d of rows[m, d] values[f, d]

Only proposals can change by it; what is emitted is the target's all the same.
Source: the format, arXiv 2209.05433; its scales, by channel and by token, the
scheme FP8_DYNAMIC of package compressed-tensors.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import Device
from pallas_kernels.fp8_matmul import fp8_matmul, quantize
from pallas_kernels.fp8_matmul.quantization import quantize_rows, rescale

_quantize = jax.jit(quantize)


@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
  """What stands in the place of a kernel f[D, F]; layers.matmul knows it.

  Attributes:
    values: those of e4m3; each class has its own dtype and layout.
    scale: f32[F], of the output channels.
  """

  values: jax.Array
  scale: jax.Array

  def multiply(self, x: jax.Array) -> jax.Array:
    """x f[..., D] -> f32[..., F]."""
    raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Kernel(QuantizedKernel):
  """A kernel as files and GPUs have it: values e4m3[F, D]."""

  @classmethod
  def quantize(cls, kernel: jax.Array) -> "Fp8Kernel":
    """The nearest to a kernel f[D, F], each channel's largest entry at 448."""
    return cls(*_quantize(kernel))

  @property
  def shape(self) -> tuple[int, int]:
    """[D, F], of the kernel that it stands for."""
    F, D = self.values.shape
    return D, F

  def multiply(self, x: jax.Array) -> jax.Array:
    """See QuantizedKernel; by a kernel of the device where it has one."""
    y = fp8_matmul(x.reshape(-1, x.shape[-1]), self.values, self.scale)
    return y.reshape(*x.shape[:-1], -1)

  def decode(self) -> "DecodedKernel":
    """The same kernel for a device that multiplies no 8 bits."""
    values = self.values.T.astype(jnp.float32)
    return DecodedKernel(values, self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodedKernel(QuantizedKernel):
  """The same numbers in float32, values f32[D, F]: an exact emulation.

  A product of two e4m3 numbers has 8 significant bits, so that float32 holds
  it whole and only sums round, as they do in a tensor core.
  """

  def multiply(self, x: jax.Array) -> jax.Array:
    """See QuantizedKernel."""
    rows, row_scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    product = jnp.dot(
      rows.astype(jnp.float32),
      self.values,
      precision=jax.lax.Precision.HIGHEST,
    )
    y = rescale(product, row_scale, self.scale)
    return y.reshape(*x.shape[:-1], -1)


def is_kernel(leaf: Any) -> bool:
  """Whether a leaf of parameters is a kernel in 8 bits."""
  return isinstance(leaf, QuantizedKernel)


def for_device(params: dict[Any, Any]) -> dict[Any, Any]:
  """Parameters as the default device multiplies them fastest.

  Where no kernel takes 8 bits they are decoded once, here, and not in every
  round; that takes the memory of float32.
  """
  if Device.current().architecture is not None:
    return params
  return jax.tree.map(
    lambda leaf: leaf.decode() if isinstance(leaf, Fp8Kernel) else leaf,
    params,
    is_leaf=is_kernel,
  )


def stored_bytes(params: Any, dtype: str | None) -> int:
  """Bytes of parameters as files and GPUs have them.

  Args:
    params: of a drafter.
    dtype: of all that is not in 8 bits; None as `params` are.
  """

  def count(leaf: Any) -> int:
    if isinstance(leaf, QuantizedKernel):
      return leaf.values.size + leaf.scale.nbytes
    return leaf.size * jnp.dtype(dtype or leaf.dtype).itemsize

  return sum(map(count, jax.tree.leaves(params, is_leaf=is_kernel)))
