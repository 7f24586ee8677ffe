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

from dflash_jax.weights.fields import parse_json, read_json
from dflash_jax.weights.names import OnError, WeightsError, give_up, telling

# The limit of the reference implementation.
_LONGEST_HEADER = 100_000_000
_METADATA = "__metadata__"
# Past any real tensor, and small enough to count with.
_LARGEST_COUNT = 2**48
_MOST_DIMENSIONS = 8
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
    header = parse_json(bytes(data[8 : 8 + length]))
  except (ValueError, RecursionError) as error:
    raise WeightsError(
      f"{path}: its header is not sound JSON: {error}; {_REMEDY}"
    ) from error
  if not isinstance(header, dict):
    raise WeightsError(f"{path}: its header is no table of tensors; {_REMEDY}")
  return header


def _naturals(value: Any) -> bool:
  return isinstance(value, list) and all(
    type(item) is int and 0 <= item <= _LARGEST_COUNT for item in value
  )


def _parse_entry(
  path: pathlib.Path, name: str, entry: Any, data: memoryview
) -> StoredTensor:
  """One tensor of the header, its bytes checked against `data`."""
  entry = entry if isinstance(entry, dict) else {}
  dtype, shape = entry.get("dtype"), entry.get("shape")
  offsets = entry.get("data_offsets")
  is_sound = _naturals(shape) and _naturals(offsets) and len(offsets) == 2
  if not is_sound or len(shape) > _MOST_DIMENSIONS:
    raise WeightsError(
      f"{path}: the header's entry of tensor {name} is malformed "
      f"({entry!r:.200}); {_REMEDY}",
      name,
    )
  if not isinstance(dtype, str) or dtype not in _DTYPES:
    raise WeightsError(
      f"{path}: tensor {name} has the unknown dtype {dtype!r:.80}; take the "
      "checkpoint in float32, bfloat16 or float16",
      name,
    )
  begin, end = offsets
  size = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
  if end - begin != size:
    raise WeightsError(
      f"{path}: tensor {name} of {dtype} and shape {tuple(shape)} takes "
      f"{size} bytes, but its entry says {begin} to {end}; {_REMEDY}",
      name,
    )
  if end > len(data):
    raise WeightsError(
      f"{path}: tensor {name} ends at data byte {end}, but the file has "
      f"{len(data)} data bytes; {_REMEDY}",
      name,
    )
  return StoredTensor(path, dtype, tuple(shape), data, begin, end)


def _map(path: pathlib.Path) -> memoryview:
  """The bytes of a file, which stay on disk until read."""
  try:
    if path.exists() and not path.is_file():
      raise ValueError("it is no regular file")
    with path.open("rb") as file:
      # mmap refuses an empty file, which is as short as any other stub.
      whole = os.fstat(file.fileno()).st_size
      mapped = (
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if whole else b""
      )
  except (OSError, ValueError) as error:  # ValueError: no name of a file
    raise WeightsError(f"{path}: cannot be read: {error}") from error
  return memoryview(mapped)


def read_safetensors(
  path: str | os.PathLike[str], on_error: OnError = give_up
) -> Tensors:
  """Checks a file's header; its tensors stay on disk until viewed.

  Args:
    path: the file.
    on_error: told of each fault; of what it lets pass, the sound tensors are
      returned.

  Raises:
    WeightsError: no such file, or not a whole, sound safetensors file.
  """
  path = pathlib.Path(path)
  tensors: Tensors = {}
  with telling(on_error):
    data = _map(path)
    header = _parse_header(path, data)
    header.pop(_METADATA, None)
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    for name, entry in header.items():
      with telling(on_error):
        tensors[name] = _parse_entry(path, name, entry, body)
    if len(tensors) == len(header):  # else any gap has been told already
      _check_order(path, tensors, len(body), on_error)
  return tensors


def _check_order(
  path: pathlib.Path, tensors: Tensors, size: int, on_error: OnError
) -> None:
  """Tells of tensors that do not fill `size` bytes one after the other."""
  reached = 0
  order = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
  for name, tensor in order:
    if tensor.begin != reached:
      on_error(
        WeightsError(
          f"{path}: tensor {name} begins at data byte {tensor.begin}, expected "
          f"{reached}: tensors overlap or leave a gap; {_REMEDY}",
          name,
        )
      )
    reached = tensor.end
  if reached != size:
    on_error(
      WeightsError(
        f"{path}: tensors fill {reached} bytes, but the file has {size} "
        f"data bytes; {_REMEDY}"
      )
    )


def read_checkpoint(
  directory: pathlib.Path, on_error: OnError = give_up
) -> Tensors:
  """All tensors of a directory: one file, or the shards of an index.

  `on_error` is as in `read_safetensors`.
  """
  single = directory / "model.safetensors"
  index = directory / "model.safetensors.index.json"
  if single.exists():
    return read_safetensors(single, on_error)
  tensors: Tensors = {}
  weight_map: dict[str, str] = {}
  with telling(on_error):
    weight_map = _read_index(directory, index)
  for shard in sorted(set(weight_map.values())):
    found = read_safetensors(directory / shard, on_error)
    for name in sorted(found.keys() & tensors.keys()):
      on_error(
        WeightsError(
          f"{directory / shard}: tensor {name} is also in "
          f"{tensors[name].path.name}; fetch the checkpoint again",
          name,
        )
      )
    tensors |= found
  for name, shard in weight_map.items():
    if name not in tensors or tensors[name].path.name != shard:
      on_error(
        WeightsError(
          f"{index}: tensor {name} is missing from {shard}; shards and index "
          "belong to different checkpoints: fetch them again",
          name,
        )
      )
  return tensors


def _read_index(directory: pathlib.Path, index: pathlib.Path) -> dict[str, str]:
  """The shard of each tensor."""
  if not index.exists():
    raise WeightsError(
      f"{directory}: holds neither model.safetensors nor {index.name}; only "
      "safetensors are read: convert other weights, or fetch them again"
    )
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(
    isinstance(shard, str) and shard == pathlib.PurePath(shard).name
    for shard in weight_map.values()
  ):
    raise WeightsError(
      f"{index}: weight_map does not name files beside it; fetch it again"
    )
  return weight_map


def weight(tensors: Tensors, name: str) -> np.ndarray:
  """A tensor of parameters; WeightsError unless its dtype holds them."""
  tensor = tensors[name]
  if tensor.dtype not in _WEIGHTS:
    raise WeightsError(
      f"{tensor.path}: tensor {name} is stored as {tensor.dtype}; supported "
      f"are {', '.join(_WEIGHTS)}: take the checkpoint in one of those",
      name,
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
