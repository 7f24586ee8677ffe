"""Targets in Hugging Face layout: a directory, or an id on the hub."""

import os
import pathlib
import re
from typing import Any, cast

import numpy as np

from dflash_jax.config import ConfigError, RotaryScaling, TargetConfig
from dflash_jax.weights import (
  experts,
  families,
  mxfp4,
  names,
  quantization,
  safetensors_file,
)
from dflash_jax.weights.fields import MOST_LAYERS, Fields, read_json
from dflash_jax.weights.names import WeightsError
from dflash_jax.weights.target_names import target_table

_CONFIG_REMEDY = "fetch the checkpoint again, config included"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
# Qwen3's head width when its config names none.
QWEN3_HEAD_WIDTH = 128
_ANOTHER_MODEL = "use a model without it"


def find_directory(source: str | os.PathLike[str]) -> pathlib.Path:
  """The directory of a checkpoint; a hub id is fetched (or found cached).

  Raises:
    WeightsError: there is no such directory, or the hub is out of reach.
  """
  directory = pathlib.Path(source)
  if directory.is_dir():
    return directory
  repository = str(source)
  if not _HUB_ID.fullmatch(repository):
    raise WeightsError(
      f"{repository!r} is neither a directory nor a hub id like 'owner/name'; "
      "check the path"
    )
  import huggingface_hub  # Slow to import, and only this branch needs it.

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        repository, allow_patterns=list(_HUB_FILES)
      )
    )
  except (OSError, ValueError) as error:
    raise WeightsError(
      f"no directory {repository!r}, and the Hugging Face hub did not give "
      f"it: {error}; where there is a network, run `hf download {repository} "
      "--local-dir DIR`, copy DIR here and name it instead"
    ) from error


def read_config_fields(directory: pathlib.Path) -> Fields:
  """config.json of a checkpoint."""
  path = directory / "config.json"
  return Fields(read_json(path), str(path), _CONFIG_REMEDY)


def read_rotary(fields: Fields) -> tuple[float, RotaryScaling | None]:
  """Base and scaling of rotary, in either spelling.

  `rope_scaling` beside `rope_theta` is how transformers wrote them before
  version 5, `rope_parameters` is how it does now.
  """
  key = "rope_scaling" if fields.raw("rope_scaling") else "rope_parameters"
  rope = fields.section(key)
  top = fields.positive("rope_theta", 10000.0)
  base = rope.positive("rope_theta", top)
  if base != top and fields.raw("rope_theta") is not None:
    raise fields.fault("rope_theta", f"is {top}, but {key} says {base}")
  for name in families.KINDS:
    if rope.raw(name) is not None:
      raise rope.refuse(
        name, rope.raw(name), "all layers must share one rotary"
      )
  for place in (fields, rope):
    if place.number("partial_rotary_factor", 1.0) != 1.0:
      part = place.raw("partial_rotary_factor")
      raise place.refuse("partial_rotary_factor", part, _ANOTHER_MODEL)
  kind = rope.text("rope_type", rope.text("type", "default"))
  if kind == "default":
    return base, None
  if kind not in ("llama3", "yarn", "linear"):
    raise rope.refuse(
      "rope_type", kind, "supported: default, llama3, yarn, linear"
    )
  return base, _read_scaling(fields, rope, kind)


def _read_scaling(fields: Fields, rope: Fields, kind: str) -> RotaryScaling:
  if kind == "linear":
    return RotaryScaling("linear", rope.positive("factor"))
  length = "original_max_position_embeddings"
  trained = fields.integer("max_position_embeddings")
  original = fields.integer(length, rope.integer(length, trained))
  factor = rope.positive("factor")
  if kind == "llama3":
    low, high = (
      rope.positive("low_freq_factor"),
      rope.positive("high_freq_factor"),
    )
    if low >= high:
      raise rope.fault("low_freq_factor", f"is {low}, not below {high}")
    return RotaryScaling("llama3", factor, original, low, high)
  for key in ("mscale", "mscale_all_dim"):
    if rope.raw(key) is not None:
      raise rope.refuse(key, rope.raw(key), _ANOTHER_MODEL)
  given = rope.raw("attention_factor") is not None
  return RotaryScaling(
    "yarn",
    factor,
    original,
    beta_fast=rope.positive("beta_fast", 32.0),
    beta_slow=rope.positive("beta_slow", 1.0),
    attention_factor=rope.positive("attention_factor") if given else None,
    truncate=rope.flag("truncate", True),
  )


def read_layer_windows(fields: Fields) -> tuple[tuple[bool, int], ...]:
  """Per layer: whether it is a sliding one, and its window, 0 for none."""
  count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
  used = fields.flag("use_sliding_window", False)
  window = fields.integer("sliding_window", 0, least=0) if used else 0
  if fields.raw("layer_types") is None:
    first = fields.integer("max_window_layers", 28, least=0)
    slides = [window > 0 and i >= first for i in range(count)]
  else:
    kinds = fields.items("layer_types", str)
    if len(kinds) != count:
      raise fields.fault(
        "layer_types", f"has {len(kinds)} entries for {count} layers"
      )
    for kind in kinds:
      if kind not in families.KINDS:
        raise fields.refuse("layer_types", kind, _ANOTHER_MODEL)
    slides = [kind == "sliding_attention" for kind in kinds]
  return tuple((slide, window if slide else 0) for slide in slides)


def refuse_options(fields: Fields) -> None:
  """Raises WeightsError for options that no network here has."""
  if fields.text("hidden_act", "silu") not in ("silu", "swish"):
    raise fields.refuse("hidden_act", fields.raw("hidden_act"), "only silu is")
  # Of Qwen2 and gpt-oss biases are not an option: they always have them.
  has_option = fields.raw("model_type") not in ("qwen2", "gpt_oss")
  for key in ("attention_bias", "mlp_bias"):
    if has_option and fields.flag(key, False):
      raise fields.refuse(key, True, _ANOTHER_MODEL)


def read_head_width(fields: Fields, default: int = 0) -> int:
  """head_dim, else `default`, else the width divided among the heads."""
  width = fields.integer("hidden_size")
  heads = fields.integer("num_attention_heads")
  if fields.raw("head_dim") is None and not default and width % heads:
    raise fields.fault(
      "head_dim", f"is missing, and {heads} heads do not divide {width}"
    )
  return fields.integer("head_dim", default or width // heads)


def read_eos_ids(directory: pathlib.Path) -> tuple[int, ...]:
  """End tokens of config.json and generation_config.json."""
  fields = families.text_part(read_config_fields(directory))
  places = [fields]
  path = directory / "generation_config.json"
  if path.exists():
    places.append(Fields(read_json(path), str(path), _CONFIG_REMEDY))
  ids: list[int] = []
  most = fields.integer("vocab_size") - 1
  for place in places:
    value = place.raw("eos_token_id")
    if isinstance(value, list):
      ids += place.items("eos_token_id", int)
    elif value is not None:
      ids.append(place.integer("eos_token_id", least=0))
    if ids and not 0 <= min(ids) <= max(ids) <= most:
      raise place.fault("eos_token_id", f"is {value}, expected 0 to {most}")
  return tuple(dict.fromkeys(ids))


def read_target_config(
  directory: str | os.PathLike[str], drafts: bool = False
) -> TargetConfig:
  """The network that a directory's config.json describes.

  Args:
    directory: in Hugging Face layout.
    drafts: whether it will draft; only then may it be in 8 bits. A target
      rounded so would answer a pass of one token and one of many differently,
      where they now agree but for the last bit, and nothing would be lossless.

  Raises:
    WeightsError: no sound config.json, another kind of model, or an option
      that would change the result and is not supported; named.
  """
  directory = pathlib.Path(directory)
  fields = families.complete(read_config_fields(directory))
  family = fields.text("model_type")
  refuse_options(fields)
  _check_quantization(fields, drafts)
  heads = fields.integer("num_attention_heads")
  max_length = fields.integer("max_position_embeddings")
  head_width = read_head_width(
    fields, QWEN3_HEAD_WIDTH if family == "qwen3" else 0
  )
  base, scaling = read_rotary(fields)
  try:
    return TargetConfig(
      family=cast(Any, family),
      num_layers=fields.integer("num_hidden_layers", most=MOST_LAYERS),
      width=fields.integer("hidden_size"),
      mlp_width=fields.integer("intermediate_size"),
      num_heads=heads,
      num_kv_heads=fields.integer("num_key_value_heads", heads),
      head_width=head_width,
      vocab_size=fields.integer("vocab_size"),
      norm_epsilon=fields.positive("rms_norm_eps"),
      rotary_base=base,
      rotary_scaling=scaling,
      tied_head=fields.flag("tie_word_embeddings", False),
      max_length=max_length,
      eos_ids=read_eos_ids(directory),
      **families.read_options(
        fields, head_width, _reached_windows(fields, max_length)
      ),
    )
  except ConfigError as error:
    raise WeightsError(f"{fields.source}: {error}; {_CONFIG_REMEDY}") from error


def _reached_windows(fields: Fields, max_length: int) -> tuple[int, ...]:
  """Per layer its window; 0 for none, or for one longer than any text."""
  if fields.raw("model_type") == "llama":
    return ()
  layers = read_layer_windows(fields)
  return tuple(window if window < max_length else 0 for _, window in layers)


def _check_quantization(fields: Fields, drafts: bool) -> None:
  """Raises WeightsError for a network in bits that would not be lossless."""
  stated = fields.raw(quantization.CONFIG)
  if stated is None:
    return
  family = fields.text("model_type")
  if family == "gpt_oss" and mxfp4.is_stated(fields):
    return
  if not drafts or family in ("gpt_oss", "qwen3_moe"):
    raise fields.refuse(
      quantization.CONFIG,
      stated,
      "take the unquantised checkpoint, or a GGUF file",
    )


def drop_tied_copy(tensors: safetensors_file.Tensors) -> None:
  """Removes a stored head that is the embedding, as the config promised."""
  head = tensors.get("lm_head.weight")
  embedding = tensors.get("model.embed_tokens.weight")
  if head is None or embedding is None:
    return
  same = head.dtype == embedding.dtype and np.array_equal(
    head.view().view(np.uint8), embedding.view().view(np.uint8)
  )
  if not same:
    raise WeightsError(
      f"{head.path}: lm_head.weight differs from model.embed_tokens.weight, "
      "but config.json says tie_word_embeddings; set that to false if the "
      "head is meant, or remove lm_head.weight",
      "lm_head.weight",
    )
  del tensors["lm_head.weight"]


def load_target(
  source: str | os.PathLike[str],
  dtype: Any = "float32",
  drafts: bool = False,
) -> tuple[TargetConfig, names.Params]:
  """A target from a directory or the hub, converted tensor by tensor.

  Args:
    source: a directory in Hugging Face layout, or "owner/name" on the hub.
    dtype: of the parameters, float32 or bfloat16; kernels in 8 bits stay so.
    drafts: see `read_target_config`.

  Raises:
    WeightsError: nothing usable is there; says what and what to do.
  """
  directory = find_directory(source)
  config = read_target_config(directory, drafts)
  fields = read_config_fields(directory)
  tensors = families.text_tensors(
    fields, safetensors_file.read_checkpoint(directory)
  )
  if config.tied_head:
    drop_tied_copy(tensors)
  table = target_table(config)
  stored: mxfp4.Mxfp4Weights | quantization.Weights
  if mxfp4.is_stated(fields):
    stored = mxfp4.Mxfp4Weights.read(tensors, table, str(directory))
  else:
    stored = quantization.Weights.read(tensors, fields, table)
  names.check_tensors(
    stored.shapes(), table, source=str(directory), extras=names.TARGET_EXTRAS
  )
  params = names.build_tree(table, stored.fetch, dtype)
  experts.gather(params, config)
  if config.tied_head:
    names.tie_head(params)
  return config, params
