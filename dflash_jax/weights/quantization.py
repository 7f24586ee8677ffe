"""Kernels in 8 bits, in files: e4m3 weights, and a scale for each row of them.

The layout is the scheme FP8_DYNAMIC of package compressed-tensors, which vLLM,
SGLang, TensorRT-LLM and transformers read:

  LAYER.weight         F8_E4M3 [F, D], of a linear layer
  LAYER.weight_scale   F32 [F, 1]; BF16 and F16 are read too
  config.json          quantization_config: the scheme, and the linear layers
                       that it leaves alone

Heads stay as they are, here as there; so do embeddings, norms, convolutions,
tables with a row per token, and a GRU, which is no linear layer.
Source: compressed-tensors, quantization/quant_scheme.py (the scheme) and
quant_config.py (the keys); a scale's shape, vLLM's CompressedTensorsW8A8Fp8.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.fp8 import Fp8Kernel
from dflash_jax.weights import safetensors_file
from dflash_jax.weights.fields import Fields
from dflash_jax.weights.names import (
  FP8,
  SCALE,
  OnError,
  Params,
  Path,
  Table,
  WeightsError,
  give_up,
  telling,
)
from dflash_jax.weights.safetensors_file import StoredTensor, Tensors

CONFIG = "quantization_config"
_WEIGHT = ".weight"
_NAN = 0x7F  # e4m3's only NaN, but for its sign
_REMEDY = "fetch the drafter again, or quantise the original anew"

# Linear layers that stay: heads, which have a row per token, and a vector.
_KEPT: frozenset[Path] = frozenset(
  {
    ("head", "kernel"),
    ("corrector", "after", "kernel"),
    ("corrector", "widen", "kernel"),
    ("confidence", "projection", "kernel"),
  }
)

_SCHEME = {"quant_method": "compressed-tensors", "format": "float-quantized"}
_WEIGHTS = {
  "num_bits": 8,
  "type": "float",
  "strategy": "channel",
  "symmetric": True,
  "dynamic": False,
}
_ACTIVATIONS = _WEIGHTS | {"strategy": "token", "dynamic": True}
# What compressed-tensors takes where a key is missing.
_DEFAULTS = {"symmetric": True, "dynamic": False}


def quantizable(table: Table) -> frozenset[str]:
  """Names of the kernels that may be in 8 bits."""
  linear = _linear_layers(table)
  return frozenset(name for name in linear if table[name].path not in _KEPT)


def _linear_layers(table: Table) -> list[str]:
  return [
    name
    for name, row in table.items()
    if row.transpose and name.endswith(_WEIGHT)
  ]


def quantize(params: Params, table: Table) -> Params:
  """The same parameters, with every kernel in 8 bits that may be; traceable."""
  paths = {table[name].path for name in quantizable(table)}

  def convert(path, leaf):
    chosen = tuple(entry.key for entry in path) in paths
    return Fp8Kernel.quantize(leaf) if chosen else leaf

  return jax.tree_util.tree_map_with_path(convert, params)


def check_kernels(params: Params, table: Table) -> None:
  """Raises WeightsError for a kernel in 8 bits that holds no usable numbers."""
  for name in sorted(quantizable(table)):
    leaf: Any = params
    for key in table[name].path:
      leaf = leaf[key]
    _check_sound(leaf, name, "params to quantise")


def _check_sound(kernel: Fp8Kernel, name: str, source: str) -> None:
  """Raises WeightsError for a scale or value that is no number to use."""
  scale = np.asarray(kernel.scale)
  wrong = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
  if wrong.size:
    raise WeightsError(
      f"{source}: {name}{SCALE} is {scale[wrong[0]]} in row {wrong[0]}, "
      f"expected finite and positive; {_REMEDY}"
    )
  codes = np.asarray(kernel.values).view(np.uint8) & _NAN
  rows = np.flatnonzero((codes == _NAN).any(axis=1))
  if rows.size:
    raise WeightsError(
      f"{source}: {name} holds NaN in row {rows[0]}, expected numbers; "
      f"{_REMEDY}"
    )


# --- config.json --------------------------------------------------------------


def describe(table: Table, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
  """What config.json says of tensors to store; nothing, if none is e4m3."""
  linear = _linear_layers(table)
  kept = {name for name in linear if tensors[name].dtype != FP8}
  if len(kept) == len(linear):
    return {}
  ignored = {name.removesuffix(_WEIGHT) for name in kept} | {"lm_head"}
  group = {
    "targets": ["Linear"],
    "weights": _WEIGHTS,
    "input_activations": _ACTIVATIONS,
    "output_activations": None,
  }
  return {
    CONFIG: {
      **_SCHEME,
      "quantization_status": "compressed",
      "config_groups": {"group_0": group},
      "ignore": sorted(ignored),
      "kv_cache_scheme": None,
    }
  }


def _read_ignored(fields: Fields) -> frozenset[str]:
  """The layers that a quantization_config leaves alone.

  Raises:
    WeightsError: another scheme than the one written here.
  """
  section = fields.section(CONFIG)
  _demand(section, _SCHEME)
  groups = section.section("config_groups")
  if len(groups.values) != 1:
    raise section.refuse(
      "config_groups", sorted(groups.values), "one group is, of all layers"
    )
  group = groups.section(next(iter(groups.values)))
  _demand(group, {"targets": ["Linear"]})
  _demand(group.section("weights"), _WEIGHTS)
  _demand(group.section("input_activations"), _ACTIVATIONS)
  for place, key in (
    (group, "output_activations"),
    (section, "kv_cache_scheme"),
  ):
    if place.raw(key) is not None:
      raise place.refuse(key, place.raw(key), "take a drafter without it")
  return frozenset(section.items("ignore", str, []))


def _demand(section: Fields, wanted: dict[str, Any]) -> None:
  """Raises WeightsError unless the keys have these values."""
  for key, value in wanted.items():
    found = section.raw(key)
    if found is None:
      found = _DEFAULTS.get(key)
    if found != value:
      raise section.refuse(
        key, found, f"{value!r} is, as train.export --quantize=fp8 writes it"
      )


# --- Reading ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weights:
  """The tensors of a checkpoint, kernels in 8 bits among them.

  Attributes:
    tensors: as stored, by their published names, scales included.
    quantized: names of the kernels in 8 bits.
  """

  tensors: Tensors
  quantized: frozenset[str]

  @classmethod
  def read(
    cls,
    tensors: Tensors,
    fields: Fields,
    table: Table,
    publish: Callable[[str], str] = str,
    on_error: OnError = give_up,
  ) -> "Weights":
    """Checks that tensors, config.json and each other agree on what is e4m3.

    Args:
      tensors: of a checkpoint, by their published names.
      fields: of its config.json.
      table: of its network.
      publish: gives the published name of a tensor that config.json names.
      on_error: told of each fault.

    Raises:
      WeightsError: another scheme, a kernel that is not as config.json says,
        or a scale that is missing, superfluous or of another shape.
    """
    quantized: frozenset[str] = frozenset()
    if fields.raw(CONFIG) is not None:
      with telling(on_error):
        ignored = {publish(layer + _WEIGHT) for layer in _read_ignored(fields)}
        quantized = (quantizable(table) & tensors.keys()) - ignored
    for name in sorted(quantized):
      with telling(on_error):
        _check_scale(tensors, name)
    for name, tensor in tensors.items():
      with telling(on_error):
        _check_place(tensor, name, quantized)
    return cls(tensors, quantized)

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The stored shape of every tensor but the scales."""
    scales = {name + SCALE for name in self.quantized}
    found = safetensors_file.shapes(self.tensors)
    return {name: found[name] for name in found.keys() - scales}

  def fetch(self, name: str) -> np.ndarray | Fp8Kernel:
    """A parameter; WeightsError for a dtype or number that cannot be one."""
    if name not in self.quantized:
      return safetensors_file.weight(self.tensors, name)
    scale = safetensors_file.weight(self.tensors, name + SCALE)
    kernel = Fp8Kernel(
      # Copies, as `names.place` makes: the file must not be read later.
      jnp.asarray(self.tensors[name].view().copy()),
      jnp.asarray(scale[:, 0].astype(np.float32)),
    )
    _check_sound(kernel, name, str(self.tensors[name].path))
    return kernel

  def check(self, name: str) -> None:
    """Raises WeightsError for what `fetch` would, without a copy."""
    if name not in self.quantized:
      safetensors_file.weight(self.tensors, name)
      return
    scale = safetensors_file.weight(self.tensors, name + SCALE)
    values: Any = self.tensors[name].view()
    column: Any = scale[:, 0].astype(np.float32)
    _check_sound(Fp8Kernel(values, column), name, str(self.tensors[name].path))


def _check_scale(tensors: Tensors, name: str) -> None:
  """Raises WeightsError unless a kernel is e4m3 and has its scale."""
  tensor = tensors[name]
  if tensor.dtype != "F8_E4M3":
    raise WeightsError(
      f"{tensor.path}: tensor {name} is stored as {tensor.dtype}, but by "
      f"{CONFIG} in config.json it is F8_E4M3; name its layer in ignore, or "
      f"{_REMEDY}",
      name,
    )
  scale = tensors.get(name + SCALE)
  if scale is None:
    raise WeightsError(
      f"{tensor.path}: {name}{SCALE} is missing, and without it {name} says "
      f"nothing; {_REMEDY}",
      name,
    )
  expected = (*tensor.shape[:1], 1)
  if scale.shape != expected:
    raise WeightsError(
      f"{scale.path}: {name}{SCALE} has shape {scale.shape}, expected "
      f"{expected}, a number for each row of {name}; {_REMEDY}",
      name,
    )


def _check_place(
  tensor: StoredTensor, name: str, quantized: frozenset[str]
) -> None:
  """Raises WeightsError for e4m3, or a scale, that config.json knows not of."""
  if tensor.dtype == "F8_E4M3" and name not in quantized:
    raise WeightsError(
      f"{tensor.path}: tensor {name} is stored as F8_E4M3, but config.json "
      f"does not say so ({CONFIG}, less its ignore), or it is a head or table, "
      f"which stay as they are; {_REMEDY}",
      name,
    )
  kernel = name.removesuffix(SCALE)
  if name == kernel + SCALE and kernel not in quantized:
    raise WeightsError(
      f"{tensor.path}: {name} is a scale of shape {tensor.shape}, but {kernel} "
      f"is not in 8 bits; {_REMEDY}",
      name,
    )
