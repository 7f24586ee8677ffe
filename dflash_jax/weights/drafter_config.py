"""config.json of a drafter in the published layout, read and written."""

import pathlib
from typing import Any

from dflash_jax import features
from dflash_jax.config import ConfigError, DrafterConfig, RotaryScaling
from dflash_jax.weights import drafter_parts, huggingface, safetensors_file
from dflash_jax.weights.drafter_parts import MIXED
from dflash_jax.weights.fields import MOST_LAYERS, Fields
from dflash_jax.weights.names import WeightsError


class DraftFields(Fields):
  """config.json, where `dflash_config` overrides the top level."""

  @classmethod
  def merge(cls, top: Fields) -> "DraftFields":
    """The settings of both places."""
    nested = top.section("dflash_config").values
    stated = {key: value for key, value in nested.items() if value is not None}
    return cls({**top.values, **stated}, top.source, top.remedy)


def _read_architecture(fields: Fields) -> str:
  architectures = fields.items("architectures", str)
  known = drafter_parts.ARCHITECTURES
  if len(architectures) != 1 or architectures[0] not in known:
    raise fields.refuse(
      "architectures", architectures, f"supported: {', '.join(known)}"
    )
  if (model_type := fields.text("model_type")) != "qwen3":
    raise fields.refuse("model_type", model_type, "supported: qwen3")
  huggingface.refuse_options(fields)
  return architectures[0]


def _read_attention(
  fields: Fields, architecture: str
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
  """Windows and in-block causality of every layer."""
  if architecture == MIXED:
    return (
      tuple(fields.items("layer_windows", int)),
      tuple(fields.items("layer_causal", bool)),
    )
  layers = huggingface.read_layer_windows(fields)
  windows = tuple(window for _, window in layers)
  for key in ("is_causal", "causal"):
    if fields.raw(key) is not None:
      return windows, (fields.flag(key, False),) * len(layers)
  return windows, tuple(slides for slides, _ in layers)


def _read_taps(fields: Fields, num_layers: int) -> tuple[int, ...]:
  if fields.raw("target_layer_ids") is not None:
    return tuple(fields.items("target_layer_ids", int))
  depth = fields.integer("num_target_layers", most=MOST_LAYERS)
  try:
    return features.choose_taps(depth, num_layers)
  except ValueError as error:
    raise fields.fault("target_layer_ids", f"is missing: {error}") from error


def _read_target_width(
  tensors: safetensors_file.Tensors, directory: pathlib.Path, num_taps: int
) -> int:
  """Width of the target, which only the shape of fc.weight tells."""
  tensor = tensors.get("fc.weight")
  if tensor is None or len(tensor.shape) != 2 or not num_taps:
    raise WeightsError(
      f"{directory}: there is no matrix fc.weight for {num_taps} taps; this "
      "is no DFlash drafter, or its copy is incomplete: fetch it again",
      "fc.weight",
    )
  if tensor.shape[1] % num_taps or not tensor.shape[1]:
    raise WeightsError(
      f"{tensor.path}: fc.weight has shape {tensor.shape}, which {num_taps} "
      "taps of config.json do not divide; config and weights belong to "
      "different checkpoints: fetch both from the same place",
      "fc.weight",
    )
  return tensor.shape[1] // num_taps


def read_config(
  directory: pathlib.Path, fields: Fields, tensors: safetensors_file.Tensors
) -> DrafterConfig:
  """The drafter of a checkpoint.

  Args:
    directory: it, for messages.
    fields: its settings, in the keys of the release.
    tensors: by their published names.

  Raises:
    WeightsError: another kind of drafter, or settings that contradict.
  """
  architecture = _read_architecture(fields)
  base, scaling = huggingface.read_rotary(fields)
  num_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
  heads = fields.integer("num_attention_heads")
  taps = _read_taps(fields, num_layers)
  windows, causal = _read_attention(fields, architecture)
  softcap = fields.number("final_logit_softcapping", 0.0)
  confidence = tensors.get("confidence_head.proj.weight")
  parts = drafter_parts.read_parts(
    fields,
    architecture,
    max(confidence.shape, default=0) if confidence else None,
  )
  try:
    return DrafterConfig(
      num_layers=num_layers,
      width=fields.integer("hidden_size"),
      mlp_width=fields.integer("intermediate_size"),
      num_heads=heads,
      num_kv_heads=fields.integer("num_key_value_heads", heads),
      head_width=huggingface.read_head_width(
        fields, huggingface.QWEN3_HEAD_WIDTH
      ),
      vocab_size=fields.integer("vocab_size"),
      block_size=fields.integer("block_size", 16),
      mask_token_id=fields.integer("mask_token_id", least=0),
      target_layer_ids=taps,
      num_target_layers=fields.integer(
        "num_target_layers", least=0, most=MOST_LAYERS
      ),
      target_width=_read_target_width(tensors, directory, len(taps)),
      norm_epsilon=fields.positive("rms_norm_eps"),
      rotary_base=base,
      rotary_scaling=scaling,
      layer_windows=windows,
      layer_causal=causal,
      input_embedding_scale=fields.number("input_embedding_scale", 1.0),
      output_multiplier=fields.number("output_multiplier", 1.0),
      logit_softcap=softcap if softcap > 0 else None,
      max_length=fields.integer("max_position_embeddings"),
      **parts,
    )
  except ConfigError as error:
    raise WeightsError(f"{fields.source}: {error}; {fields.remedy}") from error


def scaling_fields(scaling: RotaryScaling | None) -> dict[str, Any] | None:
  """Rotary scaling as config.json's rope_scaling; None for none."""
  if scaling is None:
    return None
  fields: dict[str, Any] = {
    "rope_type": scaling.kind,
    "factor": scaling.factor,
  }
  if scaling.kind == "linear":
    return fields
  fields["original_max_position_embeddings"] = scaling.original_length
  if scaling.kind == "llama3":
    fields["low_freq_factor"] = scaling.low_frequency_factor
    fields["high_freq_factor"] = scaling.high_frequency_factor
    return fields
  fields["beta_fast"] = scaling.beta_fast
  fields["beta_slow"] = scaling.beta_slow
  fields["truncate"] = scaling.truncate
  if scaling.attention_factor is not None:
    fields["attention_factor"] = scaling.attention_factor
  return fields


def _attention_fields(config: DrafterConfig) -> dict[str, Any]:
  """Keys of windows and causality; see `_read_attention`.

  They and the architecture, which is MIXED where windows or causality mix in
  ways that the published keys cannot say.
  """
  architecture = drafter_parts.architecture_of(config)
  windows, causal = config.layer_windows, config.layer_causal
  sizes = {window for window in windows if window}
  slides = tuple(window > 0 for window in windows)
  fields: dict[str, Any] = {
    "layer_types": [
      "sliding_attention" if slide else "full_attention" for slide in slides
    ],
    "use_sliding_window": bool(sizes),
    "sliding_window": max(sizes, default=None),
    "max_window_layers": config.num_layers,
  }
  mixed = len(sizes) > 1 or (len(set(causal)) > 1 and causal != slides)
  if mixed or architecture == MIXED:
    fields["layer_windows"] = list(windows)
    fields["layer_causal"] = list(causal)
    return fields | {"architectures": [MIXED]}
  if causal != slides:
    fields["is_causal"] = causal[0]
  return fields | {"architectures": [architecture]}


def drafter_fields(config: DrafterConfig, dtype: str) -> dict[str, Any]:
  """config.json of a drafter; `read_config` is its inverse."""
  scaling = scaling_fields(config.rotary_scaling)
  rotary = scaling or {"rope_type": "default"}
  nested: dict[str, Any] = {
    "block_size": config.block_size,
    "mask_token_id": config.mask_token_id,
    "target_layer_ids": list(config.target_layer_ids),
    "input_embedding_scale": config.input_embedding_scale,
    "output_multiplier": config.output_multiplier,
  }
  if config.logit_softcap is not None:
    nested["final_logit_softcapping"] = config.logit_softcap
  attention = _attention_fields(config)
  if attention.get("is_causal"):
    nested["causal"] = True  # where vLLM looks
  (architecture,) = attention["architectures"]
  module = drafter_parts.MODULES[architecture]
  top, parts = drafter_parts.part_fields(config)
  return {
    **attention,
    **top,
    "model_type": "qwen3",
    "auto_map": {"AutoModel": f"{module}.{architecture}"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    # Older readers look for it here.
    "block_size": config.block_size,
    "dflash_config": nested | parts,
    "head_dim": config.head_width,
    "hidden_act": "silu",
    "hidden_size": config.width,
    "initializer_range": 0.02,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_length,
    "num_attention_heads": config.num_heads,
    "num_hidden_layers": config.num_layers,
    "num_key_value_heads": config.num_kv_heads,
    "num_target_layers": config.num_target_layers,
    "rms_norm_eps": config.norm_epsilon,
    "rope_parameters": {**rotary, "rope_theta": config.rotary_base},
    "rope_scaling": scaling,
    "rope_theta": config.rotary_base,
    "tie_word_embeddings": False,
    "torch_dtype": dtype,
    "vocab_size": config.vocab_size,
  }
