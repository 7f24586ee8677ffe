"""fp8_matmul: a few rows times a matrix of e4m3 weights."""

from pallas_kernels.fp8_matmul.api import fp8_matmul
from pallas_kernels.fp8_matmul.quantization import quantize

__all__ = ["fp8_matmul", "quantize"]
