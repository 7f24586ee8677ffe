"""Real shapes of an operation: what is compiled ahead, and what is timed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Case:
  """One call of an operation at one shape.

  Attributes:
    name: operation/model, shape.
    call: (*operands, implementation=...) -> arrays.
    operands: their shapes and types, pytrees of ShapeDtypeStruct.
    bytes: that must cross global memory at least.
    flops: of the mathematics, padding apart.
  """

  name: str
  call: Callable[..., Any]
  operands: tuple[Any, ...]
  bytes: int
  flops: int


@dataclasses.dataclass(frozen=True)
class Budget:
  """What a compiled kernel may take; none may spill.

  Attributes:
    instruction: of the tensor cores, which its machine code must contain; None
      for a kernel that multiplies no matrices.
    registers: of a thread.
    shared_bytes: of a CTA.
    tensor_columns: of tensor memory.
  """

  instruction: str | None
  registers: int
  shared_bytes: int
  tensor_columns: int = 0


def array(*shape: int, dtype: jax.typing.DTypeLike) -> jax.ShapeDtypeStruct:
  """An abstract operand."""
  return jax.ShapeDtypeStruct(shape, dtype)
