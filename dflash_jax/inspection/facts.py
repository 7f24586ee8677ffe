"""What a network says of itself, as facts by name."""

import collections
import dataclasses
import math
from typing import Any

from dflash_jax.config import DrafterConfig, RotaryScaling, TargetConfig
from dflash_jax.networks import Eagle3Config
from dflash_jax.weights import drafter_parts
from dflash_jax.weights.safetensors_file import Tensors
from pallas_kernels.devices import cache_sizes

Network = DrafterConfig | Eagle3Config | TargetConfig

_TITLES = {
  drafter_parts.DFLASH: "DFlash drafter",
  drafter_parts.DFLASH2: "DFlash 2 drafter",
  drafter_parts.DSPARK: "DSpark drafter",
  drafter_parts.DOMINO: "Domino drafter",
  drafter_parts.MIXED: "block drafter of mixed parts",
}
_FAMILIES = {
  "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe":
  "Qwen3-MoE", "gpt_oss": "gpt-oss", "gemma3_text": "Gemma 3",
}  # fmt: skip
_MIB = 2**20


def title_of(network: Network) -> str:
  """What to call it."""
  if isinstance(network, DrafterConfig):
    return _TITLES[drafter_parts.architecture_of(network)]
  if isinstance(network, Eagle3Config):
    return "EAGLE-3 drafter"
  family = _FAMILIES.get(network.family, network.family)
  return f"language model of family {family}, a target or a small drafter"


def describe_weights(tensors: Tensors) -> dict[str, Any]:
  """Counts of parameters and bytes, beside the caches that could hold them."""
  parameters: collections.Counter[str] = collections.Counter()
  size = 0
  for tensor in tensors.values():
    if tensor.dtype.startswith(("F", "BF")):  # others map ids
      parameters[tensor.dtype] += math.prod(tensor.shape)
      size += tensor.end - tensor.begin
  return weights_facts(parameters, size)


def weights_facts(parameters: dict[str, int], size: int) -> dict[str, Any]:
  """The same of numbers by dtype, and bytes of all."""
  holds: dict[str, list[str]] = {"large enough": [], "too small": []}
  for model, cache in sorted(cache_sizes().items()):
    word = "large enough" if size <= cache else "too small"
    holds[word].append(f"{model} ({cache / _MIB:.0f} MiB)")
  return {
    "parameters": sum(parameters.values()),
    "by dtype": dict(sorted(parameters.items())),
    "weight bytes": size,
    "L2 caches": {word: models for word, models in holds.items() if models},
  }


def guess(tensors: Tensors) -> str:
  """What the names of tensors look like, "" if nothing that is known here."""
  if "fc.weight" in tensors:
    is_eagle = any(name.startswith("midlayer.") for name in tensors)
    return "an EAGLE-3 drafter" if is_eagle else "a block drafter"
  is_model = "model.embed_tokens.weight" in tensors
  return "a language model" if is_model else ""


def describe(network: Network) -> dict[str, Any]:
  """Its shape, and what of a target it asks for."""
  rotary = {"base": network.rotary_base} | _scaling(network.rotary_scaling)
  depth = 1 if isinstance(network, Eagle3Config) else network.num_layers
  shape: dict[str, Any] = {
    "layers": depth,
    "width": network.width,
    "mlp width": network.mlp_width,
    "heads": {
      "query": network.num_heads,
      "key/value": network.num_kv_heads,
      "width": network.head_width,
    },
    "vocabulary": network.vocab_size,
    "rotary": rotary,
    "longest text": network.max_length,
  }
  if isinstance(network, DrafterConfig):
    return shape | _describe_blocks(network)
  if isinstance(network, Eagle3Config):
    return shape | _describe_eagle3(network)
  return shape | {
    "tied head": network.tied_head,
    "end tokens": list(network.eos_ids),
    "fits as drafter": {"vocabulary": network.vocab_size},
  }


def _describe_blocks(network: DrafterConfig) -> dict[str, Any]:
  parts = {
    name: dataclasses.asdict(part)
    for name in ("convolution", "selector", "markov", "gru", "confidence")
    if (part := getattr(network, name))
  }
  return {
    "block": {
      "slots": network.block_size,
      "drafts": network.num_drafts,
      "anchor drafts": network.anchor_predicts,
    },
    "taps": list(network.target_layer_ids),
    "mask token": network.mask_token_id,
    "windows": list(network.layer_windows),
    "causal": list(network.layer_causal),
    "parts": parts,
    "fits a target": {
      "layers": network.num_target_layers,
      "width": network.target_width,
      "vocabulary": network.vocab_size,
      "rotary base": network.rotary_base,
    },
  }


def _describe_eagle3(network: Eagle3Config) -> dict[str, Any]:
  return {
    "taps": list(network.target_layer_ids),
    "draft vocabulary": network.draft_vocab_size,
    "own embedding": network.own_embedding,
    "fits a target": {
      "layers": f"at least {max(network.target_layer_ids) + 1}",
      "width": network.target_width,
      "vocabulary": network.vocab_size,
    },
  }


def _scaling(scaling: RotaryScaling | None) -> dict[str, Any]:
  if scaling is None:
    return {}
  return {"scaling": scaling.kind, "factor": scaling.factor}
