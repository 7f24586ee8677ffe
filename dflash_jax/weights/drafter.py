"""Drafters in the published layout, read and written.

The layout is that of the DFlash release (package dflash, Qwen3-style
config.json, tensors without prefix), which other engines read too. A draft
vocabulary lies beside the weights in a file of its own, so that they can
ignore it.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from dflash_jax import features
from dflash_jax.config import ConfigError, DrafterConfig, RotaryScaling
from dflash_jax.weights import huggingface, names, safetensors_file
from dflash_jax.weights.atomic import replace_directory
from dflash_jax.weights.fields import MOST_LAYERS, Fields
from dflash_jax.weights.names import WeightsError

_ARCHITECTURE = "DFlashDraftModel"
# Written when windows or causality mix in ways that the published keys cannot
# say: engines that do not know the keys that do must refuse, not misread.
_MIXED_ARCHITECTURE = "DFlashMixedDraftModel"
_WEIGHTS_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"
_VOCABULARY_FILE = "draft_vocabulary.safetensors"
_FILES = frozenset({_WEIGHTS_FILE, _CONFIG_FILE, _VOCABULARY_FILE})


class _DraftFields(Fields):
  """config.json, where `dflash_config` overrides the top level."""

  @classmethod
  def read(cls, directory: pathlib.Path) -> "_DraftFields":
    top = huggingface.read_config_fields(directory)
    nested = top.section("dflash_config").values
    return cls({**top.values, **nested}, top.source, top.remedy)


def _read_architecture(fields: Fields) -> str:
  architectures = fields.items("architectures", str)
  known = (_ARCHITECTURE, _MIXED_ARCHITECTURE)
  if len(architectures) != 1 or architectures[0] not in known:
    raise fields.refuse(
      "architectures", architectures, f"supported: {_ARCHITECTURE}"
    )
  if (model_type := fields.text("model_type")) != "qwen3":
    raise fields.refuse("model_type", model_type, "supported: qwen3")
  huggingface.refuse_options(fields)
  return architectures[0]


def _read_attention(
  fields: Fields, architecture: str
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
  """Windows and in-block causality of every layer."""
  if architecture == _MIXED_ARCHITECTURE:
    return (
      tuple(fields.items("layer_windows", int)),
      tuple(fields.items("layer_causal", bool)),
    )
  layers = huggingface.read_layer_windows(fields)
  windows = tuple(window for _, window in layers)
  if fields.raw("is_causal") is None:
    return windows, tuple(slides for slides, _ in layers)
  return windows, (fields.flag("is_causal", False),) * len(layers)


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
      "is no DFlash drafter, or its copy is incomplete: fetch it again"
    )
  if tensor.shape[1] % num_taps or not tensor.shape[1]:
    raise WeightsError(
      f"{tensor.path}: fc.weight has shape {tensor.shape}, which {num_taps} "
      "taps of config.json do not divide; config and weights belong to "
      "different checkpoints: fetch both from the same place"
    )
  return tensor.shape[1] // num_taps


def _read_config(
  directory: pathlib.Path, tensors: safetensors_file.Tensors
) -> DrafterConfig:
  fields = _DraftFields.read(directory)
  architecture = _read_architecture(fields)
  base, scaling = huggingface.read_rotary(fields)
  num_layers = fields.integer("num_hidden_layers", most=MOST_LAYERS)
  heads = fields.integer("num_attention_heads")
  taps = _read_taps(fields, num_layers)
  windows, causal = _read_attention(fields, architecture)
  softcap = fields.number("final_logit_softcapping", 0.0)
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
      num_target_layers=fields.integer("num_target_layers", most=MOST_LAYERS),
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
    )
  except ConfigError as error:
    raise WeightsError(f"{fields.source}: {error}; {fields.remedy}") from error


def read_drafter_config(source: str | os.PathLike[str]) -> DrafterConfig:
  """The drafter that a directory describes; its weights are not read.

  Args:
    source: a directory in the published layout, or "owner/name" on the hub.

  Raises:
    WeightsError: another kind of drafter, or an incomplete checkpoint.
  """
  directory = huggingface.find_directory(source)
  return _read_config(directory, safetensors_file.read_checkpoint(directory))


def _check_vocabulary(ids: np.ndarray, vocab_size: int, source: str) -> None:
  sound = (
    ids.ndim == 1
    and ids.size > 0
    and ids.dtype == np.int32
    and ids[0] >= 0
    and ids[-1] < vocab_size
    and bool(np.all(np.diff(ids.astype(np.int64)) > 0))
  )
  if not sound:
    raise WeightsError(
      f"{source}: ids ({ids.dtype} of shape {ids.shape}) are not a draft "
      f"vocabulary, int32 ids that rise from 0 to at most {vocab_size - 1} "
      "without repeats; choose it again from the corpus"
    )


def _read_vocabulary(
  directory: pathlib.Path, vocab_size: int
) -> np.ndarray | None:
  path = directory / _VOCABULARY_FILE
  if not path.exists():
    return None
  tensors = safetensors_file.read_safetensors(path)
  if tensors.keys() != {"ids"}:
    raise WeightsError(
      f"{path}: holds {sorted(tensors)}, expected the one tensor ids; write "
      "the drafter again"
    )
  ids = tensors["ids"].view().copy()
  _check_vocabulary(ids, vocab_size, str(path))
  return ids


def load_drafter(
  source: str | os.PathLike[str], dtype: Any = "float32"
) -> tuple[DrafterConfig, names.Params, np.ndarray | None]:
  """A drafter, its parameters, and its draft vocabulary if it has one.

  Args:
    source: a directory in the published layout, or "owner/name" on the hub.
    dtype: of the parameters, float32 or bfloat16.

  Returns:
    The config, the parameters, and the sorted token ids i32[V'] that the
    draft head keeps, or None for all.

  Raises:
    WeightsError: another kind of drafter, or a damaged checkpoint.
  """
  directory = huggingface.find_directory(source)
  tensors = safetensors_file.read_checkpoint(directory)
  config = _read_config(directory, tensors)
  table = names.drafter_table(config)
  names.check_tensors(
    safetensors_file.shapes(tensors),
    table,
    source=str(directory),
    extras=names.DRAFTER_EXTRAS,
  )
  params = names.build_tree(
    table, lambda name: safetensors_file.weight(tensors, name), dtype
  )
  return config, params, _read_vocabulary(directory, config.vocab_size)


def _scaling_fields(scaling: RotaryScaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  fields: dict[str, Any] = {
    "rope_type": scaling.kind,
    "factor": scaling.factor,
    "original_max_position_embeddings": scaling.original_length,
  }
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
  """Top-level keys of windows and causality; see `_read_attention`."""
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
  if len(sizes) > 1 or (len(set(causal)) > 1 and causal != slides):
    fields["layer_windows"] = list(windows)
    fields["layer_causal"] = list(causal)
    return fields | {"architectures": [_MIXED_ARCHITECTURE]}
  if causal != slides:
    fields["is_causal"] = causal[0]
  return fields | {"architectures": [_ARCHITECTURE]}


def drafter_fields(config: DrafterConfig, dtype: str) -> dict[str, Any]:
  """config.json of a drafter; `read_drafter_config` is its inverse."""
  scaling = _scaling_fields(config.rotary_scaling)
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
  return {
    **_attention_fields(config),
    "model_type": "qwen3",
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    # Older readers look for it here.
    "block_size": config.block_size,
    "dflash_config": nested,
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


def save_drafter(
  directory: str | os.PathLike[str],
  config: DrafterConfig,
  params: names.Params,
  *,
  draft_vocabulary: np.ndarray | None = None,
  dtype: str = "bfloat16",
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes a drafter in the published layout, whole or not at all.

  Args:
    directory: where; an earlier drafter there is replaced, but a directory
      with other files is refused.
    config: the drafter.
    params: its parameters, in any float dtype.
    draft_vocabulary: i32[V'], sorted ids that its head keeps; None for all.
    dtype: on disk, "bfloat16" or "float32".
    extra: JSON values to keep in config.json, under "dflash_jax"; not read
      back.

  Raises:
    WeightsError: parameters that are not this drafter's, or a failed write,
      after which the earlier drafter is still there.
  """
  directory = pathlib.Path(directory)
  disk_dtype = names.parameter_dtype(dtype)
  fields = drafter_fields(config, disk_dtype.name)
  if extra is not None:
    fields["dflash_jax"] = extra
  text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
  tensors = names.stored_tensors(
    names.drafter_table(config), params, disk_dtype, source="params to save"
  )
  if draft_vocabulary is not None:
    ids = np.asarray(draft_vocabulary)
    _check_vocabulary(ids, config.vocab_size, "draft_vocabulary to save")
  with replace_directory(directory, _FILES) as temporary:
    with temporary.open(_WEIGHTS_FILE) as file:
      safetensors_file.write_safetensors(file, tensors)
    if draft_vocabulary is not None:
      with temporary.open(_VOCABULARY_FILE) as file:
        safetensors_file.write_safetensors(file, {"ids": ids})
    with temporary.open(_CONFIG_FILE) as file:
      file.write(text.encode())
