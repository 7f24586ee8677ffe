"""Expert matrices in 4 bits, as gpt-oss stores them, decoded when read.

NAME of shape [E, in, out] is stored transposed, in blocks of 32 along `in`:

  NAME_blocks   U8 [E, out, in / 32, 16], two numbers a byte, the low half first
  NAME_scales   U8 [E, out, in / 32], s, by which a block is times 2^(s - 127)

A number is a sign, two bits of exponent and one of mantissa (e2m1). All are
exact in bfloat16, so nothing is rounded here and the target is lossless.
Source: OCP Microscaling Formats 1.0, sections 5.3 and 5.4; the release of
gpt-oss for the order of the halves and of the axes.
"""

import dataclasses

import ml_dtypes
import numpy as np

from dflash_jax.weights import safetensors_file
from dflash_jax.weights.experts import FUSED
from dflash_jax.weights.fields import Fields
from dflash_jax.weights.names import Table, WeightsError
from dflash_jax.weights.quantization import CONFIG
from dflash_jax.weights.safetensors_file import StoredTensor, Tensors

BLOCK = 32
BLOCKS, SCALES = "_blocks", "_scales"
_BIAS = 127
_LARGEST_SCALE = _BIAS + 125  # 6 times more is still finite
_REMEDY = "the file is damaged: fetch the checkpoint again"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)
_PAIRS = np.stack(
  [_NUMBERS[np.arange(256) & 15], _NUMBERS[np.arange(256) >> 4]], axis=-1
)


def is_stated(fields: Fields) -> bool:
  """Whether config.json says that experts are in 4 bits."""
  stated = fields.section(CONFIG)
  return stated.raw("quant_method") == "mxfp4"


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
  """blocks u8[..., n, 16], scales u8[..., n] -> bf16[..., 32 n], exactly."""
  powers = np.ldexp(np.float32(1), scales.astype(np.int32) - _BIAS)
  numbers = _PAIRS[blocks].reshape(*scales.shape, BLOCK) * powers[..., None]
  return numbers.reshape(*scales.shape[:-1], -1).astype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class Mxfp4Weights:
  """The tensors of a checkpoint whose experts are in 4 bits.

  Attributes:
    tensors: as stored.
    packed: names of the matrices in 4 bits.
  """

  tensors: Tensors
  packed: frozenset[str]

  @classmethod
  def read(cls, tensors: Tensors, table: Table, source: str) -> "Mxfp4Weights":
    """Checks that every expert matrix has blocks and scales that fit.

    Args:
      tensors: of a checkpoint.
      table: of its network.
      source: the directory, for messages.

    Raises:
      WeightsError: one is missing, of another dtype, or of another shape.
    """
    packed = frozenset(name for name in table if name.endswith(FUSED))
    for name in sorted(packed):
      count, width_in, width_out = table[name].shape
      if width_in % BLOCK:
        raise WeightsError(
          f"{source}: {name} has {width_in} rows, and blocks of 4-bit numbers "
          f"need a multiple of {BLOCK}; config and weights belong to different "
          "checkpoints: fetch both from the same place"
        )
      if name in tensors:
        raise WeightsError(
          f"{source}: tensor {name} is there beside its blocks of 4-bit "
          "numbers; fetch the checkpoint again"
        )
      shape = (count, width_out, width_in // BLOCK)
      _check(tensors, name + BLOCKS, (*shape, BLOCK // 2), source)
      _check(tensors, name + SCALES, shape, source)
    return cls(tensors, packed)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape; of matrices in 4 bits, what they decode to."""
    found = safetensors_file.shapes(self.tensors)
    for name in self.packed:
      count, width_out, blocks, _ = found.pop(name + BLOCKS)
      found.pop(name + SCALES)
      found[name] = (count, blocks * BLOCK, width_out)
    return found

  def check(self, name: str) -> None:
    """Raises WeightsError for a matrix in 4 bits that is not finite."""
    scales = self.tensors[name + SCALES].view()
    if scales.size and scales.max() > _LARGEST_SCALE:
      raise WeightsError(
        f"{self.tensors[name + SCALES].path}: tensor {name}{SCALES} holds "
        f"{scales.max()}, expected at most {_LARGEST_SCALE}; {_REMEDY}"
      )

  def fetch(self, name: str) -> np.ndarray:
    """A parameter; WeightsError for a dtype or number that cannot be one."""
    if name not in self.packed:
      return safetensors_file.weight(self.tensors, name)
    self.check(name)
    blocks = self.tensors[name + BLOCKS].view()
    scales = self.tensors[name + SCALES].view()
    count, width_out, width_in = *scales.shape[:2], scales.shape[2] * BLOCK
    values = np.empty((count, width_in, width_out), ml_dtypes.bfloat16)
    for expert in range(count):  # one at a time: float32 is twice as large
      values[expert] = decode(blocks[expert], scales[expert]).T
    return values


def _check(
  tensors: Tensors, name: str, shape: tuple[int, ...], source: str
) -> None:
  tensor: StoredTensor | None = tensors.get(name)
  if tensor is None:
    raise WeightsError(
      f"{source}: tensor {name} is missing (shape {shape} expected), and by "
      f"{CONFIG} in config.json experts are in 4 bits; the copy is "
      "incomplete: fetch the checkpoint again"
    )
  if tensor.dtype != "U8" or tensor.shape != shape:
    raise WeightsError(
      f"{tensor.path}: tensor {name} is {tensor.dtype} of shape "
      f"{tensor.shape}, expected U8 of {shape}; config and weights belong to "
      "different checkpoints: fetch both from the same place"
    )
