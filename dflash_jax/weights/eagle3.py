"""EAGLE-3 drafters, read in both published layouts and written in the first.

The layout of EAGLE-3's own release, which SpecForge, SGLang and vLLM share, has
a flat config.json and calls the layer `midlayer`; that of speculators nests the
layer's settings in `transformer_layer_config` and calls it `layers.0`. `d2t`
says how far each row of the reduced head lies from its token's id, `t2d` which
ids are kept.
"""

import math
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from dflash_jax.config import ConfigError
from dflash_jax.features import choose_eagle3_taps
from dflash_jax.networks import Eagle3Config
from dflash_jax.weights import (
  huggingface,
  names,
  quantization,
  safetensors_file,
)
from dflash_jax.weights.draft_vocabulary import maps_of, read_maps
from dflash_jax.weights.drafter_config import scaling_fields
from dflash_jax.weights.fields import Fields
from dflash_jax.weights.model_directory import write_model
from dflash_jax.weights.names import WeightsError, make_row

ARCHITECTURES = (
  "LlamaForCausalLMEagle3",
  "Eagle3LlamaForCausalLM",
  "Eagle3DraftModel",
  "Eagle3Speculator",
)
LAYER = "midlayer"  # beginning of its tensors' names in the release
_EMBEDDING = "embed_tokens.weight"
_TAPS = "eagle_aux_hidden_state_layer_ids"
EXTRAS = re.compile(r"d2t|t2d|verifier_.*|.*rotary_emb\.inv_freq")
# Options of the layer that change the result and that nothing here has.
_REFUSED = ("norm_before_fc", "fc_norm", "norm_output")


def eagle3_table(config: Eagle3Config) -> names.Table:
  """Every tensor of a checkpoint but the maps, by its name in the release."""
  D, F, H = config.width, config.mlp_width, config.head_width
  queries, keys = config.num_heads * H, config.num_kv_heads * H
  taps = len(config.target_layer_ids) * config.target_width
  rows: dict[str, tuple[names.Path, tuple[int, ...]]] = {
    "fc": (("context_projection", "kernel"), (D, taps)),
    "midlayer.input_layernorm": (("embedding_norm", "scale"), (D,)),
    "midlayer.hidden_norm": (("hidden_norm", "scale"), (D,)),
    "midlayer.self_attn.q_proj": (
      ("attention", "query", "kernel"),
      (queries, 2 * D),
    ),
    "midlayer.self_attn.k_proj": (
      ("attention", "key", "kernel"),
      (keys, 2 * D),
    ),
    "midlayer.self_attn.v_proj": (
      ("attention", "value", "kernel"),
      (keys, 2 * D),
    ),
    "midlayer.self_attn.o_proj": (
      ("attention", "output", "kernel"),
      (D, queries),
    ),
    "midlayer.post_attention_layernorm": (("mlp_norm", "scale"), (D,)),
    "midlayer.mlp.gate_proj": (("mlp", "gate", "kernel"), (F, D)),
    "midlayer.mlp.up_proj": (("mlp", "up", "kernel"), (F, D)),
    "midlayer.mlp.down_proj": (("mlp", "down", "kernel"), (D, F)),
    "norm": (("norm", "scale"), (D,)),
    "lm_head": (("head", "kernel"), (config.draft_vocab_size, D)),
  }
  if config.own_embedding:
    rows["embed_tokens"] = (("embedding",), (config.vocab_size, D))
  return {f"{name}.weight": make_row(*row) for name, row in rows.items()}


def publish(name: str) -> str:
  """The release's name of a tensor, whoever wrote it."""
  name = name.removeprefix("model.")
  return re.sub(r"^layers\.0\.", f"{LAYER}.", name)


class _EagleFields(Fields):
  """config.json, flat: what speculators nests is lifted."""

  @classmethod
  def read(cls, directory: pathlib.Path) -> "_EagleFields":
    top = huggingface.read_config_fields(directory)
    layer = top.section("transformer_layer_config").values
    eagle = top.section("eagle_config").values
    own = {"architectures": top.raw("architectures")}
    lifted = {**top.values, **layer, **eagle, **own}
    return cls(lifted, top.source, top.remedy)


def _read_taps(
  fields: Fields, num_target_layers: int | None
) -> tuple[int, ...]:
  """Ids name the layer that a tap enters; ours the one that it leaves."""
  if fields.raw(_TAPS) is None and num_target_layers is not None:
    return choose_eagle3_taps(num_target_layers)
  ids = fields.items(_TAPS, int)
  if not ids or min(ids) < 1:
    raise fields.refuse(
      _TAPS, ids, "only outputs of layers are read, ids from 1"
    )
  return tuple(number - 1 for number in ids)


def read_tensors(
  directory: pathlib.Path, on_error: names.OnError = names.give_up
) -> safetensors_file.Tensors:
  """The stored tensors, by the release's names.

  `on_error` is as in `safetensors_file.read_safetensors`.
  """
  stored = safetensors_file.read_checkpoint(directory, on_error)
  return {publish(name): tensor for name, tensor in stored.items()}


def read_config(
  directory: pathlib.Path,
  tensors: safetensors_file.Tensors,
  num_target_layers: int | None,
) -> Eagle3Config:
  """The drafter of a checkpoint, whose tensors go by the release's names.

  Raises:
    WeightsError: another kind of drafter, or settings that contradict.
  """
  fields = _EagleFields.read(directory)
  architectures = fields.items("architectures", str)
  if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
    raise fields.refuse(
      "architectures", architectures, f"supported: {', '.join(ARCHITECTURES)}"
    )
  if (model_type := fields.text("model_type", "llama")) != "llama":
    raise fields.refuse("model_type", model_type, "supported: llama")
  huggingface.refuse_options(fields)
  for key in _REFUSED:
    if fields.flag(key, False):
      raise fields.refuse(key, True, "take a drafter trained without it")
  if (depth := fields.integer("num_hidden_layers", 1)) != 1:
    raise fields.refuse("num_hidden_layers", depth, "supported: 1")
  if "sliding_attention" in fields.items("layer_types", str, []):
    raise fields.refuse(
      "layer_types", fields.raw("layer_types"), "take a drafter without windows"
    )
  base, scaling = huggingface.read_rotary(fields)
  heads = fields.integer("num_attention_heads")
  vocab_size = fields.integer("vocab_size")
  if "t2d" in tensors:  # some releases state the draft's size in its place
    vocab_size = math.prod(tensors["t2d"].shape)
  try:
    return Eagle3Config(
      width=fields.integer("hidden_size"),
      mlp_width=fields.integer("intermediate_size"),
      num_heads=heads,
      num_kv_heads=fields.integer("num_key_value_heads", heads),
      head_width=huggingface.read_head_width(fields),
      vocab_size=vocab_size,
      draft_vocab_size=fields.integer("draft_vocab_size", vocab_size),
      target_layer_ids=(taps := _read_taps(fields, num_target_layers)),
      target_width=_read_target_width(tensors, directory, len(taps)),
      norm_epsilon=fields.positive("rms_norm_eps"),
      rotary_base=base,
      rotary_scaling=scaling,
      norm_before_residual=fields.flag("norm_before_residual", False),
      own_embedding=_EMBEDDING in tensors,
      max_length=fields.integer("max_position_embeddings"),
    )
  except ConfigError as error:
    raise WeightsError(f"{fields.source}: {error}; {fields.remedy}") from error


def _read_target_width(
  tensors: safetensors_file.Tensors, directory: pathlib.Path, num_taps: int
) -> int:
  """Width of the target, which only the shape of fc.weight tells for sure."""
  tensor = tensors.get("fc.weight")
  if tensor is None or len(tensor.shape) != 2 or tensor.shape[1] % num_taps:
    shape = None if tensor is None else tensor.shape
    raise WeightsError(
      f"{directory}: fc.weight is {shape}, expected a matrix for {num_taps} "
      f"taps; fetch the drafter again, or name its taps in {_TAPS}",
      "fc.weight",
    )
  return tensor.shape[1] // num_taps


def load_eagle3(
  source: str | os.PathLike[str],
  dtype: Any = "float32",
  num_target_layers: int | None = None,
) -> tuple[Eagle3Config, names.Params]:
  """An EAGLE-3 drafter and its parameters.

  Args:
    source: a directory in either published layout, or "owner/name" on the hub.
    dtype: of the parameters, float32 or bfloat16; None as they are stored.
      Kernels in 8 bits stay so.
    num_target_layers: depth of the target, which tells the taps where
      config.json names none.

  Raises:
    WeightsError: another kind of drafter, or a damaged checkpoint.
  """
  directory = huggingface.find_directory(source)
  tensors = read_tensors(directory)
  config = read_config(directory, tensors, num_target_layers)
  table = eagle3_table(config)
  known = quantization.Weights.read(
    tensors, huggingface.read_config_fields(directory), table, publish
  )
  names.check_tensors(
    known.shapes(), table, source=str(directory), extras=EXTRAS
  )
  params = names.build_tree(table, known.fetch, dtype)
  sizes = (config.draft_vocab_size, config.vocab_size)
  ids = read_maps(tensors, *sizes, str(directory))
  if ids is not None:
    params["head_ids"] = jnp.asarray(ids)
  return config, params


def eagle3_fields(config: Eagle3Config, dtype: str) -> dict[str, Any]:
  """config.json of the release's layout."""
  return {
    "architectures": [ARCHITECTURES[0]],
    "model_type": "llama",
    "attention_bias": False,
    "draft_vocab_size": config.draft_vocab_size,
    "eagle_config": {
      _TAPS: [tap + 1 for tap in config.target_layer_ids],
      "use_aux_hidden_state": True,
    },
    "head_dim": config.head_width,
    "hidden_act": "silu",
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_length,
    "mlp_bias": False,
    "norm_before_residual": config.norm_before_residual,
    "num_attention_heads": config.num_heads,
    "num_hidden_layers": 1,
    "num_key_value_heads": config.num_kv_heads,
    "rms_norm_eps": config.norm_epsilon,
    "rope_scaling": scaling_fields(config.rotary_scaling),
    "rope_theta": config.rotary_base,
    "target_hidden_size": config.target_width,
    "tie_word_embeddings": False,
    "torch_dtype": dtype,
    "vocab_size": config.vocab_size,
  }


def save_eagle3(
  directory: str | os.PathLike[str],
  config: Eagle3Config,
  params: names.Params,
  *,
  dtype: str | None = "bfloat16",
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes an EAGLE-3 drafter in the release's layout, whole or not at all.

  Args:
    directory: where; an earlier drafter there is replaced, but a directory
      with other files is refused.
    config: the drafter.
    params: its parameters, kernels also in 8 bits; a borrowed embedding among
      them is left out.
    dtype: on disk, "bfloat16" or "float32", of all that is not in 8 bits; None
      as `params` are.
    extra: JSON values to keep in config.json, see write_model.

  Raises:
    WeightsError: parameters that are not this drafter's, or a failed write.
  """
  table = eagle3_table(config)
  tensors = eagle3_tensors(config, params, dtype)
  fields = eagle3_fields(config, names.main_dtype(tensors))
  fields |= quantization.describe(table, tensors)
  rows = np.arange(config.draft_vocab_size)
  tensors |= maps_of(params.get("head_ids", rows), config.vocab_size)
  write_model(directory, fields, tensors, extra)


def eagle3_tensors(
  config: Eagle3Config, params: names.Params, dtype: Any
) -> dict[str, np.ndarray]:
  """What a file stores of the parameters but the maps; see `save_eagle3`."""
  left = {"head_ids"} if config.own_embedding else {"head_ids", "embedding"}
  kept = {name: part for name, part in params.items() if name not in left}
  return names.stored_tensors(
    eagle3_table(config), kept, dtype, source="params to save"
  )
