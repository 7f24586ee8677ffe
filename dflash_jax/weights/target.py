"""A target, or a small model that drafts for one, in Hugging Face layout."""

import os
from typing import Any

from dflash_jax.config import TargetConfig
from dflash_jax.weights import experts, families, names, quantization
from dflash_jax.weights.drafter_config import scaling_fields
from dflash_jax.weights.model_directory import write_model
from dflash_jax.weights.target_names import target_table


def target_fields(config: TargetConfig) -> dict[str, Any]:
  """config.json of a target but its dtype; `read_target_config` inverts it.

  Raises:
    WeightsError: a network that its family's keys cannot say.
  """
  return {
    "architectures": [families.ARCHITECTURES[config.family]],
    "model_type": config.family,
    "eos_token_id": list(config.eos_ids) or None,
    "head_dim": config.head_width,
    "hidden_act": "silu",
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "max_position_embeddings": config.max_length,
    "num_attention_heads": config.num_heads,
    "num_hidden_layers": config.num_layers,
    "num_key_value_heads": config.num_kv_heads,
    "rms_norm_eps": config.norm_epsilon,
    "rope_scaling": scaling_fields(config.rotary_scaling),
    "rope_theta": config.rotary_base,
    "tie_word_embeddings": config.tied_head,
    "vocab_size": config.vocab_size,
    **families.option_fields(config),
  }


def save_target(
  directory: str | os.PathLike[str],
  config: TargetConfig,
  params: names.Params,
  *,
  dtype: str | None = "bfloat16",
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes network and parameters, whole or not at all; no tokenizer.

  Args:
    directory: where; an earlier one there is replaced, but a directory with
      other files is refused.
    config: the network.
    params: its parameters, embedding and head included; a tied head, being the
      embedding, is not stored. Kernels may be in 8 bits, for a drafter.
    dtype: on disk, "bfloat16" or "float32", of all that is not in 8 bits; None
      as `params` are.
    extra: JSON values to keep in config.json, see write_model.

  Raises:
    WeightsError: parameters that are not this network's, or a failed write.
  """
  fields = target_fields(config)  # or refuses, before anything else
  if config.tied_head:
    params = {name: x for name, x in params.items() if name != "head"}
  params = experts.scatter(params, config)
  table = target_table(config)
  tensors = names.stored_tensors(table, params, dtype, source="params to save")
  fields["torch_dtype"] = names.main_dtype(tensors)
  fields |= quantization.describe(table, tensors)
  write_model(directory, fields, tensors, extra)
