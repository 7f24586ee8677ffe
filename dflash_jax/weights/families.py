"""What each family of targets has, and what its config.json leaves unsaid."""

import dataclasses
import math
import re
from typing import Any

from dflash_jax.target_network import Experts, Gate, TargetConfig
from dflash_jax.weights.fields import MOST_LAYERS, Fields
from dflash_jax.weights.names import WeightsError
from dflash_jax.weights.safetensors_file import Tensors

# Gemma 3 with a vision tower, whose text part is a gemma3_text.
GEMMA3_WITH_VISION = "gemma3"
ARCHITECTURES = {
  "llama": "LlamaForCausalLM",
  "qwen2": "Qwen2ForCausalLM",
  "qwen3": "Qwen3ForCausalLM",
  "qwen3_moe": "Qwen3MoeForCausalLM",
  "gpt_oss": "GptOssForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM",
}
_VISION_ARCHITECTURE = "Gemma3ForConditionalGeneration"
LANGUAGE_MODELS = frozenset({*ARCHITECTURES.values(), _VISION_ARCHITECTURE})
KINDS = ("full_attention", "sliding_attention")  # of layers
_GELU_TANH = "gelu_pytorch_tanh"

# Options of TargetConfig that are a family's own, whatever its config.json.
_OWN: dict[str, dict[str, Any]] = {
  "llama": {},
  "qwen2": {"qkv_bias": True},
  "qwen3": {"qk_norm": True},
  "qwen3_moe": {"qk_norm": True},
  "gpt_oss": {"qkv_bias": True, "output_bias": True, "attention_sinks": True},
  "gemma3_text": {
    "qk_norm": True,
    "unit_offset": True,
    "post_norms": True,
    "gate": Gate("gelu_tanh"),
  },
}
# What transformers takes where a key is missing; published configs of Gemma 3
# leave out most of these.
_DEFAULTS: dict[str, dict[str, Any]] = {
  "gpt_oss": {"head_dim": 64, "sliding_window": 128, "attention_bias": True},
  "gemma3_text": {
    "hidden_activation": _GELU_TANH,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "tie_word_embeddings": True,
  },
}
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_TEXT = re.compile(r"^(language_model\.model|model\.language_model)\.")
_ANOTHER_MODEL = "use a model without it"


def complete(fields: Fields) -> Fields:
  """The settings of a target's text part, as a plain family would spell them.

  Raises:
    WeightsError: another kind of model, or an option that none here has.
  """
  fields = text_part(fields)
  family = fields.text("model_type")
  if family not in ARCHITECTURES:
    known = (*ARCHITECTURES, GEMMA3_WITH_VISION)
    raise fields.refuse("model_type", family, f"supported: {', '.join(known)}")
  fields = _with(fields, _DEFAULTS.get(family, {}), fields.values)
  if family == "gemma3_text":
    fields = _complete_gemma3(fields)
  elif family == "gpt_oss":
    fields = _with(fields, {"layer_types": _pattern(fields, 2)}, fields.values)
    fields = _with(fields, fields.values, {"use_sliding_window": True})
  return fields


def _with(fields: Fields, *values: Any) -> Fields:
  """The same place with other values: of each key, the last that is stated."""
  merged: dict[str, Any] = {}
  for part in values:
    merged |= {key: value for key, value in part.items() if value is not None}
  return dataclasses.replace(fields, values=merged)


def text_part(fields: Fields) -> Fields:
  """What config.json says of the network that reads text."""
  if fields.raw("model_type") != GEMMA3_WITH_VISION:
    return fields
  text = fields.section("text_config")
  above = {
    key: fields.raw(key)
    for key in ("eos_token_id", "tie_word_embeddings", "quantization_config")
  }
  vocabulary = {"vocab_size": _DEFAULTS["gemma3_text"]["vocab_size"]}
  kind = {"model_type": "gemma3_text"}
  return _with(text, vocabulary, text.values, above, kind)


def text_tensors(fields: Fields, tensors: Tensors) -> Tensors:
  """The tensors of the network that reads text, by the names of one alone.

  Beside a vision tower they lie under `language_model.`, in front of `model.`
  in published files and behind it in those of some releases of transformers.

  Raises:
    WeightsError: two tensors that would have the same name.
  """
  if fields.raw("model_type") != GEMMA3_WITH_VISION:
    return tensors
  found: Tensors = {}
  for name, tensor in tensors.items():
    if _VISION.match(name):
      continue
    plain = _TEXT.sub("model.", name).removeprefix("language_model.")
    if plain in found:
      raise WeightsError(
        f"{tensor.path}: tensor {name} is there under two names; fetch the "
        "checkpoint again"
      )
    found[plain] = tensor
  return found


def _pattern(fields: Fields, every: int) -> list[str]:
  """Kinds of layers: sliding, but for each that completes a group."""
  count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
  return [
    "sliding_attention" if (i + 1) % every else "full_attention"
    for i in range(count)
  ]


def _complete_gemma3(fields: Fields) -> Fields:
  """Rotary of both kinds of layers, their pattern, and the activation."""
  for key in ("attn_logit_softcapping", "final_logit_softcapping"):
    if fields.raw(key) is not None:
      raise fields.refuse(key, fields.raw(key), _ANOTHER_MODEL)
  if fields.flag("use_bidirectional_attention", False):
    raise fields.refuse("use_bidirectional_attention", True, _ANOTHER_MODEL)
  if (given := fields.text("hidden_activation")) != _GELU_TANH:
    raise fields.refuse("hidden_activation", given, f"only {_GELU_TANH} is")
  key = "sliding_window_pattern"
  every = fields.integer(key, fields.integer("_" + key, fields.integer(key)))
  rotary: dict[str, Any] = {}
  both = fields.section("rope_parameters")
  if both.values:
    full, local = (
      both.section("full_attention"),
      both.section("sliding_attention"),
    )
    if (kind := local.text("rope_type", "default")) != "default":
      raise local.refuse("rope_type", kind, _ANOTHER_MODEL)
    rotary = {
      "rope_theta": full.raw("rope_theta"),
      "rope_scaling": {k: v for k, v in full.values.items() if "theta" not in k}
      or None,
      "rope_local_base_freq": local.raw("rope_theta"),
    }
  stated = {k: v for k, v in fields.values.items() if k != "rope_parameters"}
  return _with(
    fields,
    {"layer_types": _pattern(fields, every)},
    stated,
    rotary,
    {"use_sliding_window": True, "hidden_act": "silu"},
  )


# --- TargetConfig -------------------------------------------------------------


def read_options(
  fields: Fields, head_width: int, windows: tuple[int, ...]
) -> dict[str, Any]:
  """What a family has beyond Llama, as fields of TargetConfig.

  Args:
    fields: as `complete` gives them.
    head_width: H.
    windows: of each layer, 0 for none.
  """
  family = fields.text("model_type")
  options = dict(_OWN[family])
  if family != "llama" and any(windows):
    options["layer_windows"] = windows
  if family == "qwen3_moe":
    options["experts"] = _read_qwen3_experts(fields)
  elif family == "gpt_oss":
    if not fields.flag("attention_bias", True):
      raise fields.refuse("attention_bias", False, "only true is")
    options["experts"] = Experts(
      count=fields.integer("num_local_experts"),
      top_k=fields.integer("num_experts_per_tok"),
      width=fields.integer("intermediate_size"),
      bias=True,
    )
    options["gate"] = Gate(
      "clamped",
      slope=fields.positive("swiglu_alpha", 1.702),
      limit=fields.positive("swiglu_limit", 7.0),
    )
  elif family == "gemma3_text":
    options["embedding_scale"] = math.sqrt(fields.integer("hidden_size"))
    options["local_rotary_base"] = fields.positive("rope_local_base_freq")
    scalar = fields.integer("query_pre_attn_scalar")
    if scalar != head_width:
      options["score_scale"] = scalar**-0.5
  return options


def _read_qwen3_experts(fields: Fields) -> Experts:
  count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
  step = fields.integer("decoder_sparse_step", 1)
  dense = set(fields.items("mlp_only_layers", int, []))
  dense |= {i for i in range(count) if (i + 1) % step}
  # transformers 5 writes the second name.
  stated = fields.raw("num_experts") is not None
  return Experts(
    count=fields.integer("num_experts" if stated else "num_local_experts"),
    top_k=fields.integer("num_experts_per_tok"),
    width=fields.integer("moe_intermediate_size"),
    renormalize=fields.flag("norm_topk_prob", False),
    dense_layers=tuple(sorted(dense)),
  )


def option_fields(config: TargetConfig) -> dict[str, Any]:
  """The inverse of `read_options`: keys of config.json.

  Raises:
    WeightsError: a network that its family's keys cannot say.
  """
  _check_own(config)
  fields: dict[str, Any] = _window_fields(config)
  experts = config.experts
  if config.family == "qwen3_moe":
    assert experts is not None
    fields |= {
      "decoder_sparse_step": 1,
      "mlp_only_layers": list(experts.dense_layers),
      "moe_intermediate_size": experts.width,
      "norm_topk_prob": experts.renormalize,
      "num_experts": experts.count,
      "num_experts_per_tok": experts.top_k,
    }
  elif config.family == "gpt_oss":
    assert experts is not None
    fields |= {
      "attention_bias": True,
      "intermediate_size": experts.width,
      "num_experts_per_tok": experts.top_k,
      "num_local_experts": experts.count,
      "swiglu_alpha": config.gate.slope,
      "swiglu_limit": config.gate.limit,
    }
  elif config.family == "gemma3_text":
    scale = config.score_scale or config.head_width**-0.5
    fields |= {
      "hidden_activation": _GELU_TANH,
      "query_pre_attn_scalar": round(scale**-2),
      "rope_local_base_freq": config.local_rotary_base,
    }
  return fields


def _check_own(config: TargetConfig) -> None:
  """Raises WeightsError for an option that is another family's."""
  own = _OWN[config.family]
  defaults = {field.name: field.default for field in dataclasses.fields(config)}
  wanted = {key: defaults[key] for part in _OWN.values() for key in part} | own
  if config.family == "gpt_oss":
    del wanted["gate"]
  wanted_scale = 1.0
  if config.family == "gemma3_text":
    wanted_scale = math.sqrt(config.width)
  wanted["embedding_scale"] = wanted_scale
  for key, value in wanted.items():
    if (found := getattr(config, key)) != value:
      raise WeightsError(
        f"family {config.family} has {key}={value}, not {found}; name the "
        "family that does"
      )
  has_experts = config.family in ("qwen3_moe", "gpt_oss")
  if (config.experts is not None) != has_experts:
    raise WeightsError(
      f"family {config.family} has {'' if has_experts else 'no '}experts; "
      "name another family"
    )


def _window_fields(config: TargetConfig) -> dict[str, Any]:
  windows = set(config.layer_windows) - {0}
  if not windows:
    return {}
  if len(windows) > 1 or config.family == "llama":
    raise WeightsError(
      f"config.json of family {config.family} cannot say "
      f"layer_windows={config.layer_windows}; use one window"
    )
  return {
    "layer_types": [
      "sliding_attention" if window else "full_attention"
      for window in config.layer_windows
    ],
    "sliding_window": windows.pop(),
    "use_sliding_window": True,
  }
