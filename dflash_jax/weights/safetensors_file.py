"""Safetensors files: read without trust, written whole or not at all.

The layout is that of huggingface/safetensors: 8 bytes of header length,
little-endian; a JSON header; then the tensors' bytes, without gaps.
"""

import dataclasses
import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dflash_jax.weights.fields import read_json
from dflash_jax.weights.names import WeightsError

# The limit of the reference implementation.
_LONGEST_HEADER = 100_000_000
_METADATA = "__metadata__"
_REMEDY = "the file is damaged or its copy was cut short: fetch it again"

_DTYPES: dict[str, Any] = {
  "BOOL": np.bool_,
  "U8": np.uint8,
  "I8": np.int8,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "U16": np.uint16,
  "I16": np.int16,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "U32": np.uint32,
  "I32": np.int32,
  "F32": np.float32,
  "U64": np.uint64,
  "I64": np.int64,
  "F64": np.float64,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_WEIGHTS = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """Where a tensor lies: its file, mapped, and its place there.

  Attributes:
    path: the file. dtype: its safetensors name. shape: row-major.
    data: the file's bytes after the header. begin, end: its own.
  """

  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  data: memoryview
  begin: int
  end: int

  def view(self) -> np.ndarray:
    """The tensor, read-only, its bytes still on disk."""
    raw = np.frombuffer(self.data[self.begin : self.end], np.uint8)
    return raw.view(_DTYPES[self.dtype]).reshape(self.shape)


Tensors = dict[str, StoredTensor]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values = dict(pairs)
  if len(values) != len(pairs):
    raise ValueError("a name is there twice")
  return values


def _parse_header(path: pathlib.Path, data: memoryview) -> dict[str, Any]:
  """The JSON header of a file."""
  if len(data) < 8:
    raise WeightsError(
      f"{path}: has {len(data)} bytes, a safetensors file has at least 8; "
      f"{_REMEDY}"
    )
  (length,) = struct.unpack("<Q", data[:8])
  if length > min(len(data) - 8, _LONGEST_HEADER):
    raise WeightsError(
      f"{path}: its header claims {length} bytes, but the file has "
      f"{len(data)} (and {_LONGEST_HEADER} is the limit); not a safetensors "
      f"file, or {_REMEDY}"
    )
  try:
    header = json.loads(bytes(data[8 : 8 + length]), object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    raise WeightsError(
      f"{path}: its header is not sound JSON: {error}; {_REMEDY}"
    ) from error
  if not isinstance(header, dict):
    raise WeightsError(f"{path}: its header is no table of tensors; {_REMEDY}")
  return header


def _naturals(value: Any) -> bool:
  return isinstance(value, list) and all(
    type(item) is int and item >= 0 for item in value
  )


def _parse_entry(
  path: pathlib.Path, name: str, entry: Any, data: memoryview
) -> StoredTensor:
  """One tensor of the header, its bytes checked against `data`."""
  entry = entry if isinstance(entry, dict) else {}
  dtype, shape = entry.get("dtype"), entry.get("shape")
  offsets = entry.get("data_offsets")
  if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
    raise WeightsError(
      f"{path}: the header's entry of tensor {name} is malformed "
      f"({entry!r:.200}); {_REMEDY}"
    )
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise WeightsError(
      f"{path}: tensor {name} has the unknown dtype {dtype!r:.80}; take the "
      "checkpoint in float32, bfloat16 or float16"
    )
  begin, end = offsets
  size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
  if end - begin != size:
    raise WeightsError(
      f"{path}: tensor {name} of {dtype} and shape {tuple(shape)} takes "
      f"{size} bytes, but its entry says {begin} to {end}; {_REMEDY}"
    )
  if end > len(data):
    raise WeightsError(
      f"{path}: tensor {name} ends at data byte {end}, but the file has "
      f"{len(data)} data bytes; {_REMEDY}"
    )
  return StoredTensor(path, dtype, tuple(shape), data, begin, end)


def read_safetensors(path: str | os.PathLike[str]) -> Tensors:
  """Checks a file's header; its tensors stay on disk until viewed.

  Raises:
    WeightsError: no such file, or not a whole, sound safetensors file.
  """
  path = pathlib.Path(path)
  try:
    with path.open("rb") as file:
      # mmap refuses an empty file, which is as short as any other stub.
      whole = os.fstat(file.fileno()).st_size
      mapped = (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if whole else b""
      )
  except OSError as error:
    raise WeightsError(f"{path}: cannot be read: {error}") from error
  data = memoryview(mapped)
  header = _parse_header(path, data)
  header.pop(_METADATA, None)
  body = data[8 + struct.unpack("<Q", data[:8])[0] :]
  tensors = {
    name: _parse_entry(path, name, entry, body)
    for name, entry in header.items()
  }
  reached = 0
  order = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
  for name, tensor in order:
    if tensor.begin != reached:
      raise WeightsError(
        f"{path}: tensor {name} begins at data byte {tensor.begin}, expected "
        f"{reached}: tensors overlap or leave a gap; {_REMEDY}"
      )
    reached = tensor.end
  if reached != len(body):
    raise WeightsError(
      f"{path}: tensors fill {reached} bytes, but the file has {len(body)} "
      f"data bytes; {_REMEDY}"
    )
  return tensors


def read_checkpoint(directory: pathlib.Path) -> Tensors:
  """All tensors of a directory: one file, or the shards of an index."""
  single = directory / "model.safetensors"
  index = directory / "model.safetensors.index.json"
  if single.exists() or not index.exists():
    if not single.exists():
      raise WeightsError(
        f"{directory}: holds neither {single.name} nor {index.name}; only "
        "safetensors are read: convert other weights, or fetch them again"
      )
    return read_safetensors(single)
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(
    isinstance(shard, str) and shard == pathlib.PurePath(shard).name
    for shard in weight_map.values()
  ):
    raise WeightsError(
      f"{index}: weight_map does not name files beside it; fetch it again"
    )
  tensors: Tensors = {}
  for shard in sorted(set(weight_map.values())):
    found = read_safetensors(directory / shard)
    for name in found.keys() & tensors.keys():
      raise WeightsError(
        f"{directory / shard}: tensor {name} is also in "
        f"{tensors[name].path.name}; fetch the checkpoint again"
      )
    tensors |= found
  for name, shard in weight_map.items():
    if name not in tensors or tensors[name].path.name != shard:
      raise WeightsError(
        f"{index}: tensor {name} is missing from {shard}; shards and index "
        "belong to different checkpoints: fetch them again"
      )
  return tensors


def weight(tensors: Tensors, name: str) -> np.ndarray:
  """A tensor of parameters; WeightsError unless its dtype holds them."""
  tensor = tensors[name]
  if tensor.dtype not in _WEIGHTS:
    raise WeightsError(
      f"{tensor.path}: tensor {name} is stored as {tensor.dtype}; supported "
      f"are {', '.join(_WEIGHTS)}: take the checkpoint in one of those"
    )
  return tensor.view()


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
  """The stored shape of every tensor."""
  return {name: tensor.shape for name, tensor in tensors.items()}


def write_safetensors(
  file: BinaryIO, tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes contiguous arrays, in order, to an open file."""
  # transformers reads only files that say whose tensors they hold.
  header: dict[str, Any] = {_METADATA: {"format": "pt"}}
  offset = 0
  for name, array in tensors.items():
    header[name] = {
      "dtype": _NAMES[array.dtype],
      "shape": list(array.shape),
      "data_offsets": [offset, offset + array.nbytes],
    }
    offset += array.nbytes
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  file.write(struct.pack("<Q", len(text)) + text)
  for array in tensors.values():
    file.write(np.ascontiguousarray(array).view(np.uint8).data)
