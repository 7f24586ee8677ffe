"""Reads the header of a GGUF file, trusting none of it.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian.
Every count and length is checked against the bytes that are left before it is
used, so a damaged file costs neither memory nor time.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import numpy as np

from dflash_jax.weights.names import WeightsError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4

# ggml type: (name, elements in a block, bytes of a block).
TENSOR_TYPES = {
  0: ("F32", 1, 4),
  1: ("F16", 1, 2),
  2: ("Q4_0", 32, 18),
  3: ("Q4_1", 32, 20),
  8: ("Q8_0", 32, 34),
  12: ("Q4_K", 256, 144),
  14: ("Q6_K", 256, 210),
  30: ("BF16", 1, 2),
}
# Those that files carry and this reader refuses, so that messages name them.
_REFUSED_TYPES = {
  6: "Q5_0",
  7: "Q5_1",
  9: "Q8_1",
  10: "Q2_K",
  11: "Q3_K",
  13: "Q5_K",
  15: "Q8_K",
  16: "IQ2_XXS",
  17: "IQ2_XS",
  18: "IQ3_XXS",
  19: "IQ1_S",
  20: "IQ4_NL",
  21: "IQ3_S",
  22: "IQ2_S",
  23: "IQ4_XS",
  24: "I8",
  25: "I16",
  26: "I32",
  27: "I64",
  28: "F64",
  29: "IQ1_M",
  34: "TQ1_0",
  35: "TQ2_0",
  39: "MXFP4",
}
_REMEDY = "the file is damaged or incomplete: fetch it again"


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
  """One tensor: its type's name, row-major shape, and bytes u8[...]."""

  type_name: str
  shape: tuple[int, ...]
  data: np.ndarray


@dataclasses.dataclass(frozen=True)
class GGUFFile:
  """A parsed file: its metadata and its tensors, mapped, not read."""

  path: pathlib.Path
  metadata: dict[str, Any]
  tensors: dict[str, GGUFTensor]


class _Cursor:
  """Walks the header of one file; leaving its bytes is a WeightsError."""

  def __init__(self, data: mmap.mmap, path: pathlib.Path):
    self.data, self.path, self.offset = data, path, 0

  def fail(self, what: str) -> WeightsError:
    return WeightsError(
      f"{self.path}: {what} at byte {self.offset} of {len(self.data)}; "
      f"{_REMEDY}"
    )

  def take(self, count: int) -> bytes:
    end = self.offset + count
    if end > len(self.data):
      raise self.fail(f"the header needs {count} more bytes")
    taken = self.data[self.offset : end]
    self.offset = end
    return taken

  def scalar(self, code: str) -> Any:
    return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

  def string(self) -> str:
    raw = self.take(self.scalar("Q"))
    try:
      return raw.decode("utf-8")
    except UnicodeDecodeError:
      raise self.fail("a string that is not UTF-8 ends") from None

  def array(self) -> list[Any]:
    kind, count = self.scalar("I"), self.scalar("Q")
    # A string costs at least its own 8-byte length.
    code = _SCALARS.get(kind)
    size = struct.calcsize("<" + code) if code else 8
    if kind != _STRING and code is None:
      raise self.fail(f"an array of elements of unknown type {kind}")
    if count * size > len(self.data) - self.offset:
      raise self.fail(f"an array of {count} elements")
    if code is None:
      return [self.string() for _ in range(count)]
    return np.frombuffer(self.take(count * size), "<" + code).tolist()

  def value(self) -> Any:
    kind = self.scalar("I")
    if kind == _STRING:
      return self.string()
    if kind == _ARRAY:
      return self.array()
    if kind not in _SCALARS:
      raise self.fail(f"a value of unknown type {kind}")
    return self.scalar(_SCALARS[kind])


def _read_start(cursor: _Cursor) -> tuple[int, int]:
  """Checks magic and version; returns the counts of tensors and of keys."""
  magic = cursor.take(4)
  if magic != _MAGIC:
    raise WeightsError(
      f"{cursor.path}: not a GGUF file: it starts with {magic!r}, not "
      f"{_MAGIC!r}; name a .gguf file or an HF directory"
    )
  version = cursor.scalar("I")
  if version not in _VERSIONS:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    kind = "big-endian GGUF" if swapped in _VERSIONS else "GGUF version"
    raise WeightsError(
      f"{cursor.path}: {kind} {version} is not read, only little-endian "
      f"versions {_VERSIONS}; convert the model again with a current llama.cpp"
    )
  return cursor.scalar("Q"), cursor.scalar("Q")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
  metadata: dict[str, Any] = {}
  for _ in range(count):
    key = cursor.string()
    if key in metadata:
      raise cursor.fail(f"key {key!r} is there twice, again")
    metadata[key] = cursor.value()
  return metadata


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
  """One tensor's name, row-major shape, type and offset in the data."""
  name = cursor.string()
  dims = cursor.scalar("I")
  if not 1 <= dims <= _MAX_DIMS:
    raise cursor.fail(f"tensor {name!r} of {dims} dimensions")
  shape = tuple(cursor.scalar("Q") for _ in range(dims))[::-1]
  return name, shape, cursor.scalar("I"), cursor.scalar("Q")


def _map_tensor(
  cursor: _Cursor, start: int, info: tuple[str, tuple[int, ...], int, int]
) -> GGUFTensor:
  """The bytes of one tensor, `start` being where the file's data begins."""
  name, shape, kind, offset = info
  if kind not in TENSOR_TYPES:
    refused = _REFUSED_TYPES.get(kind, f"type {kind}")
    supported = ", ".join(row[0] for row in TENSOR_TYPES.values())
    raise WeightsError(
      f"{cursor.path}: tensor {name} is stored as {refused}; supported are "
      f"{supported}: take another quantisation of this model"
    )
  type_name, block, size = TENSOR_TYPES[kind]
  if shape[-1] % block or 0 in shape:
    raise WeightsError(
      f"{cursor.path}: tensor {name} of shape {shape} does not divide into "
      f"{type_name} blocks of {block}; {_REMEDY}"
    )
  begin, count = start + offset, math.prod(shape) // block * size
  if begin + count > len(cursor.data):
    raise WeightsError(
      f"{cursor.path}: tensor {name} ends at byte {begin + count}, but the "
      f"file has {len(cursor.data)}; {_REMEDY}"
    )
  data = np.frombuffer(cursor.data, np.uint8, count, begin)
  return GGUFTensor(
    type_name, shape, data.reshape(*shape[:-1], shape[-1] // block * size)
  )


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
  """Parses and checks a GGUF file; its tensors stay on disk until used.

  Raises:
    WeightsError: no such file, or not a whole, sound GGUF file.
  """
  path = pathlib.Path(path)
  try:
    if path.exists() and not path.is_file():
      raise ValueError("it is no regular file")
    with path.open("rb") as file:
      data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError) as error:  # ValueError: an empty file.
    raise WeightsError(f"{path}: cannot be read: {error}") from error
  cursor = _Cursor(data, path)
  num_tensors, num_keys = _read_start(cursor)
  metadata = _read_metadata(cursor, num_keys)
  infos = [_read_info(cursor) for _ in range(num_tensors)]
  alignment = metadata.get("general.alignment", 32)
  if not isinstance(alignment, int) or alignment < 1:
    raise cursor.fail(f"alignment {alignment!r} read before the data")
  start = -(-cursor.offset // alignment) * alignment
  tensors: dict[str, GGUFTensor] = {}
  for info in infos:
    if info[0] in tensors:
      raise cursor.fail(f"tensor {info[0]!r} is there twice, before the data")
    tensors[info[0]] = _map_tensor(cursor, start, info)
  return GGUFFile(path, metadata, tensors)
