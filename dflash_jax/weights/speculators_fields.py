"""config.json in the layout of package speculators, written.

Its inverse is `speculators_config.py`. What it cannot say of a drafter is
refused, with the reason.
"""

import dataclasses
from typing import Any

from dflash_jax.config import DrafterConfig
from dflash_jax.networks import Eagle3Config
from dflash_jax.weights import drafter_parts
from dflash_jax.weights.drafter_config import drafter_fields, scaling_fields
from dflash_jax.weights.eagle3 import eagle3_fields
from dflash_jax.weights.names import WeightsError
from dflash_jax.weights.speculators_config import (
  ANCHORLESS_RNN,
  ARCHITECTURES,
  EAGLE3,
  EAGLE3_TAPS,
  PARTS,
  TAPS,
  TYPE,
  Serving,
)

_VERSION = "0.9.0"
_LAYER_KEYS = (
  "attention_bias",
  "head_dim",
  "hidden_act",
  "hidden_size",
  "intermediate_size",
  "max_position_embeddings",
  "model_type",
  "num_attention_heads",
  "num_hidden_layers",
  "num_key_value_heads",
  "rms_norm_eps",
  "tie_word_embeddings",
  "vocab_size",
)
# Fields of DrafterConfig that it has no key for, where they do nothing.
_UNKNOWN = {
  "input_embedding_scale": 1.0,
  "output_multiplier": 1.0,
  "logit_softcap": None,
}
_BLOCK_KEYS = (
  *_LAYER_KEYS,
  "attention_dropout",
  "initializer_range",
  "layer_types",
  "max_window_layers",
  "rope_parameters",
  "sliding_window",
  "use_sliding_window",
)


def _refuse(what: str, why: str) -> WeightsError:
  return WeightsError(
    f"the speculators layout cannot say {what}: {why}; write the release's, "
    "--layout=release"
  )


def _type_of(config: DrafterConfig) -> str:
  """The type that has exactly these parts.

  Raises:
    WeightsError: no type has them.
  """
  types = {
    drafter_parts.DFLASH: "dflash",
    drafter_parts.DFLASH2: "dflash2",
    drafter_parts.DSPARK: "dspark",
  }
  # That the anchor drafts too is a key here, and no other architecture.
  plain = dataclasses.replace(config, anchor_predicts=False)
  architecture = drafter_parts.architecture_of(plain)
  if architecture not in types:
    raise _refuse(
      f"a drafter of architecture {architecture}",
      f"it knows {', '.join(types.values())} and their parts alone",
    )
  return types[architecture]


def check_block_drafter(config: DrafterConfig, columns: int) -> None:
  """Raises WeightsError, with the reason, for what the layout cannot say.

  Args:
    config: the drafter.
    columns: V', of its head.
  """
  kind = _type_of(config)
  for name, neutral in _UNKNOWN.items():
    if (value := getattr(config, name)) != neutral:
      raise _refuse(
        f"{name}={value}", "embeddings and logits are taken as they are"
      )
  windows, causal = config.layer_windows, config.layer_causal
  slides = tuple(window > 0 for window in windows)
  if len(set(windows) - {0}) > 1:
    raise _refuse(f"layer_windows={windows}", "it has one window")
  if causal != slides and any(causal):
    raise _refuse(
      f"layer_causal={causal} with layer_windows={windows}",
      "layers without a window are bidirectional, those with one are alike",
    )
  if config.target_width != config.width:
    raise _refuse(
      f"width={config.width} for a target of {config.target_width}",
      "taps have the drafter's own width",
    )
  if kind == "dflash2" and columns != config.vocab_size:
    raise _refuse(
      f"a draft vocabulary of {columns} with a selector",
      f"its dflash2 takes all {config.vocab_size} tokens",
    )
  markov = config.markov
  if markov and markov.kind == "rnn" and not config.anchor_predicts:
    raise _refuse("an rnn of drafts alone", ANCHORLESS_RNN)
  if config.convolution and config.convolution.kernel_size > config.block_size:
    raise _refuse(
      f"convolution.kernel_size={config.convolution.kernel_size} in blocks of "
      f"{config.block_size}",
      "a kernel is no longer than a block",
    )


def block_fields(
  config: DrafterConfig, columns: int, dtype: str, serving: Serving
) -> dict[str, Any]:
  """config.json of a block drafter; `release_fields` is its inverse.

  Args:
    config: the drafter, see `check_block_drafter`.
    columns: V', of its head.
    dtype: of the tensors.
    serving: its use.
  """
  kind = _type_of(config)
  release = drafter_fields(config, dtype)
  slides = any(config.layer_windows)
  free = not any(config.layer_causal) if slides else kind == "dflash2"
  fields = {
    TAPS: [tap + 1 for tap in config.target_layer_ids],
    "block_size": config.block_size,
    "mask_token_id": config.mask_token_id,
    "sample_from_anchor": config.anchor_predicts,
    "sliding_window_non_causal": free,
    "transformer_layer_config": {key: release[key] for key in _BLOCK_KEYS},
  }
  if config.num_target_layers:
    fields["num_target_layers"] = config.num_target_layers
  if kind != "dflash":
    _, parts = drafter_parts.part_fields(config)
    if kind == "dspark":
      parts.setdefault("markov_head_type", "vanilla")
      parts.setdefault("enable_confidence_head", False)
      parts.setdefault("confidence_head_with_markov", False)
    fields |= {key: parts[key] for key in PARTS[kind]}
  drafts = serving.num_drafts or config.num_drafts
  return fields | _common_fields(kind, columns, dtype, serving, drafts)


def eagle3_layout_fields(
  config: Eagle3Config, dtype: str, serving: Serving
) -> dict[str, Any]:
  """config.json of an EAGLE-3 drafter in this layout.

  Raises:
    WeightsError: it cannot say what the drafter is.
  """
  if config.target_width != config.width:
    raise _refuse(
      f"width={config.width} for a target of {config.target_width}",
      "taps have the drafter's own width",
    )
  release = eagle3_fields(config, dtype)
  layer = {key: release[key] for key in (*_LAYER_KEYS, "mlp_bias")}
  scaling = scaling_fields(config.rotary_scaling)
  layer["rope_parameters"] = {
    **(scaling or {"rope_type": "default"}),
    "rope_theta": config.rotary_base,
  }
  fields = {
    EAGLE3_TAPS: [tap + 1 for tap in config.target_layer_ids],
    "embed_requires_grad": False,
    "fc_norm": False,
    "norm_before_fc": False,
    "norm_before_residual": config.norm_before_residual,
    "norm_output": False,
    "transformer_layer_config": layer,
  }
  # Its own converter assumes three drafts where nothing is said.
  drafts, columns = serving.num_drafts or 3, config.draft_vocab_size
  return fields | _common_fields(EAGLE3, columns, dtype, serving, drafts)


def _common_fields(
  kind: str, columns: int, dtype: str, serving: Serving, drafts: int
) -> dict[str, Any]:
  proposal = {
    "proposal_type": "greedy",
    "speculative_tokens": drafts,
    "verifier_accept_k": 1,
    "accept_tolerance": 0.0,
  }
  return {
    TYPE: kind,
    "architectures": [ARCHITECTURES[kind][0]],
    "draft_vocab_size": columns,
    "dtype": dtype,
    "speculators_config": {
      "algorithm": kind,
      "default_proposal_method": "greedy",
      "proposal_methods": [proposal],
      "verifier": {
        "architectures": list(serving.architectures),
        "name_or_path": serving.verifier,
      },
    },
    "speculators_version": _VERSION,
    "target_hidden_size": None,
    "tie_word_embeddings": False,
  }
