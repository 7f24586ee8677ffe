"""The numbers of stored tensors, looked at in pieces where they lie on disk."""

import dataclasses
from typing import Any

import numpy as np

from dflash_jax.weights.safetensors_file import StoredTensor

# All bits of the exponent: set in no finite number.
_EXPONENTS: dict[str, tuple[Any, int]] = {
  "F16": (np.uint16, 0x7C00),
  "BF16": (np.uint16, 0x7F80),
  "F32": (np.uint32, 0x7F800000),
  "F64": (np.uint64, 0x7FF0000000000000),
}
_PIECE = 2**22  # numbers


@dataclasses.dataclass(frozen=True)
class Values:
  """What a tensor holds: how many numbers are NaN or infinite; only zeros?"""

  not_finite: int
  is_zero: bool


def scan(tensor: StoredTensor) -> Values | None:
  """Looks at every number; None for a dtype without NaN.

  Bits are compared, because numpy knows no bfloat16 and converting a large
  tensor takes its memory twice.
  """
  if tensor.dtype not in _EXPONENTS:
    return None
  word, exponent = _EXPONENTS[tensor.dtype]
  bits = np.frombuffer(tensor.data[tensor.begin : tensor.end], word)
  magnitude = np.iinfo(word).max >> 1
  not_finite, is_zero = 0, bits.size > 0
  for start in range(0, bits.size, _PIECE):
    piece = bits[start : start + _PIECE]
    not_finite += int(np.count_nonzero((piece & exponent) == exponent))
    is_zero = is_zero and not np.any(piece & magnitude)
  return Values(not_finite, is_zero)


def scan_array(values: np.ndarray) -> Values:
  """The same of numbers in memory."""
  not_finite = values.size - int(np.count_nonzero(np.isfinite(values)))
  return Values(not_finite, values.size > 0 and not np.any(values))
