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


def _publish(name: str) -> str:
  """The release's name of a tensor, whoever wrote it."""
  name = name.removeprefix("model.")
  return re.sub(r"^layers\.0\.", "midlayer.", name)


class _EagleFields(Fields):
  """config.json, flat: what speculators nests is lifted."""

  @classmethod
  def read(cls, directory: pathlib.Path) -> "_EagleFields":
    top = huggingface.read_config_fields(directory)
    layer = top.section("transformer_layer_config").values
    eagle = top.section("eagle_config").values
    lifted = {**top.values, **layer, **eagle}
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
  return {_publish(name): tensor for name, tensor in stored.items()}


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


def read_head_ids(
  tensors: safetensors_file.Tensors, config: Eagle3Config, source: str
) -> np.ndarray | None:
  """i32[V'], token id of each row of the head; None if rows are ids."""
  V, size = config.vocab_size, config.draft_vocab_size
  rows = np.arange(size, dtype=np.int64)
  offsets = tensors["d2t"].view() if "d2t" in tensors else np.zeros_like(rows)
  remedy = "fetch the drafter again"
  if offsets.shape != (size,) or offsets.dtype.kind not in "iu":
    raise WeightsError(
      f"{source}: d2t is {offsets.dtype}{list(offsets.shape)}, expected one "
      f"whole number for each of {size} rows of the head; {remedy}"
    )
  if "d2t" not in tensors and size < V:
    raise WeightsError(
      f"{source}: d2t is missing, though the head has {size} rows for a "
      f"vocabulary of {V}; {remedy}"
    )
  ids = rows + offsets.astype(np.int64)
  if ids.min() < 0 or ids.max() >= V or len(np.unique(ids)) < size:
    raise WeightsError(
      f"{source}: d2t leads to ids {ids.min()}..{ids.max()}, expected {size} "
      f"different ones of 0..{V - 1}; {remedy}"
    )
  if size < V and "t2d" in tensors:
    kept = tensors["t2d"].view().astype(bool)
    if not np.array_equal(np.flatnonzero(kept), np.sort(ids)):
      raise WeightsError(
        f"{source}: d2t and t2d name different tokens; {remedy}"
      )
  whole = size == V and np.array_equal(ids, rows)
  return None if whole else ids.astype(np.int32)


def load_eagle3(
  source: str | os.PathLike[str],
  dtype: Any = "float32",
  num_target_layers: int | None = None,
) -> tuple[Eagle3Config, names.Params]:
  """An EAGLE-3 drafter and its parameters.

  Args:
    source: a directory in either published layout, or "owner/name" on the hub.
    dtype: of the parameters, float32 or bfloat16; kernels in 8 bits stay so.
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
    tensors, huggingface.read_config_fields(directory), table
  )
  names.check_tensors(
    known.shapes(), table, source=str(directory), extras=EXTRAS
  )
  params = names.build_tree(table, known.fetch, dtype)
  ids = read_head_ids(tensors, config, str(directory))
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
  dtype: str = "bfloat16",
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes an EAGLE-3 drafter in the release's layout, whole or not at all.

  Args:
    directory: where; an earlier drafter there is replaced, but a directory
      with other files is refused.
    config: the drafter.
    params: its parameters, kernels also in 8 bits; a borrowed embedding among
      them is left out.
    dtype: on disk, "bfloat16" or "float32", of all that is not in 8 bits.
    extra: JSON values to keep in config.json, see write_model.

  Raises:
    WeightsError: parameters that are not this drafter's, or a failed write.
  """
  disk_dtype = names.parameter_dtype(dtype)
  table = eagle3_table(config)
  borrowed = set() if config.own_embedding else {"embedding"}
  tensors = names.stored_tensors(
    table,
    {k: v for k, v in params.items() if k not in borrowed | {"head_ids"}},
    disk_dtype,
    source="params to save",
  )
  rows = np.arange(config.draft_vocab_size, dtype=np.int64)
  ids = np.asarray(params.get("head_ids", rows), np.int64)
  tensors["d2t"] = ids - rows
  tensors["t2d"] = np.isin(np.arange(config.vocab_size), ids)
  fields = eagle3_fields(config, disk_dtype.name)
  fields |= quantization.describe(table, tensors)
  write_model(directory, fields, tensors, extra)
