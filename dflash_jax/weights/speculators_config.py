"""config.json in the layout of package speculators, read.

The layer's settings are nested in `transformer_layer_config`; taps go by the
layer that they enter, ours by the one that they leave; `speculators_config`
names the target. Keys, defaults and meanings: speculators 0.9.0, models/*/
config.py and core.py. What it does not say, and this project does, is the
target's depth; `num_target_layers` is ours, and its reader leaves it alone.
"""

import dataclasses
from typing import Any

from dflash_jax.weights import drafter_parts
from dflash_jax.weights.fields import MOST_LAYERS, Fields

TYPE = "speculators_model_type"
BLOCK_TYPES = ("dflash", "dflash2", "dspark")
EAGLE3 = "eagle3"
TAPS = "aux_hidden_state_layer_ids"
EAGLE3_TAPS = "eagle_aux_hidden_state_layer_ids"
# The names of its classes, and ours for the same networks.
ARCHITECTURES = {
  "dflash": ("DFlashDraftModel", drafter_parts.DFLASH),
  "dflash2": ("DFlash2DraftModel", drafter_parts.DFLASH2),
  "dspark": ("DSparkDraftModel", drafter_parts.DSPARK),
  EAGLE3: ("Eagle3DraftModel", ""),
}
ANCHORLESS_RNN = (
  "the package's rnn also passes the anchor's slot, where it then drafts "
  "nothing, and the one here begins with the first draft"
)
# Keys of the release that its reader ignores, and values that change nothing.
_UNKNOWN = {
  "input_embedding_scale": 1.0,
  "output_multiplier": 1.0,
  "final_logit_softcapping": 0.0,
}
# Keys of transformer_layer_config that its network reads; others mean nothing.
_LAYER_KEYS = (
  "attention_bias",
  "head_dim",
  "hidden_act",
  "hidden_size",
  "intermediate_size",
  "layer_types",
  "max_position_embeddings",
  "max_window_layers",
  "mlp_bias",
  "num_attention_heads",
  "num_hidden_layers",
  "num_key_value_heads",
  "original_max_position_embeddings",
  "partial_rotary_factor",
  "rms_norm_eps",
  "rope_parameters",
  "rope_scaling",
  "rope_theta",
  "sliding_window",
  "use_sliding_window",
  "vocab_size",
)
# Parts of a kind, and their defaults.
PARTS: dict[str, dict[str, Any]] = {
  "dflash": {},
  "dflash2": {
    "conv_kernel_size": 2,
    "conv_group_size": 16,
    "selector_rank": 256,
    "selector_top_k": 16,
  },
  "dspark": {
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
  },
}


def read_type(fields: Fields) -> str | None:
  """Which drafter of this layout config.json describes; None: another layout.

  Raises:
    WeightsError: a drafter of this layout that nothing here runs.
  """
  if fields.raw(TYPE) is None:
    return None
  known = (*BLOCK_TYPES, EAGLE3)
  if (kind := fields.text(TYPE)) not in known:
    raise fields.refuse(TYPE, kind, f"supported: {', '.join(known)}")
  return kind


def release_fields(fields: Fields) -> Fields:
  """config.json of a block drafter, in the keys of the release.

  Raises:
    WeightsError: a setting that no network here has; named.
  """
  kind = fields.text(TYPE)
  layer = fields.section("transformer_layer_config")
  _refuse_unknown(fields, layer)
  if kind == "dflash2" and read_head_size(fields) != layer.raw("vocab_size"):
    raise fields.refuse(
      "draft_vocab_size",
      read_head_size(fields),
      "the selector of dflash2 takes the whole vocabulary",
    )
  anchored = fields.flag("sample_from_anchor", kind == "dspark")
  rnn = kind == "dspark" and fields.raw("markov_head_type") == "rnn"
  if rnn and not anchored:
    raise fields.refuse("sample_from_anchor", anchored, ANCHORLESS_RNN)
  values = _read_layer(fields, layer)
  for key, default in PARTS[kind].items():
    stated = fields.raw(key)
    values[key] = default if stated is None else stated
  values |= {
    "architectures": [ARCHITECTURES[kind][1]],
    "block_size": fields.integer("block_size", 8),
    "mask_token_id": fields.raw("mask_token_id"),
    "target_layer_ids": _read_taps(fields),
    "num_target_layers": fields.integer(
      "num_target_layers", 0, least=0, most=MOST_LAYERS
    ),
    "sample_from_anchor": anchored,
  }
  return Fields(values, fields.source, fields.remedy)


def _refuse_unknown(fields: Fields, layer: Fields) -> None:
  for place in (fields, layer, fields.section("dflash_config")):
    for key, neutral in _UNKNOWN.items():
      if place.number(key, neutral) != neutral:
        raise place.refuse(
          key,
          place.raw(key),
          "this layout has no such key, and its own reader would ignore it",
        )


def _read_layer(fields: Fields, layer: Fields) -> dict[str, Any]:
  """The layers' settings; their causality in the words of the release."""
  model_type = layer.text("model_type", "qwen3")
  if model_type not in ("qwen3", "llama"):
    raise layer.refuse("model_type", model_type, "supported: qwen3, llama")
  values = {key: layer.raw(key) for key in _LAYER_KEYS}
  values["model_type"] = "qwen3"
  if model_type == "llama":  # it has no such keys, though files may
    values["use_sliding_window"] = layer.raw("layer_types") is not None
    if layer.raw("head_dim") is None:
      heads = layer.integer("num_attention_heads")
      values["head_dim"] = layer.integer("hidden_size") // heads
  kind = fields.text(TYPE)
  free = fields.flag("sliding_window_non_causal", kind == "dflash2")
  # Where no window is, all layers are bidirectional, sliding ones too.
  windowed = values["use_sliding_window"] and layer.raw("sliding_window")
  values["is_causal"] = False if free or not windowed else None
  return values


def _read_taps(fields: Fields) -> list[int]:
  """Ids name the layer that a tap enters; ours the one that it leaves."""
  ids = fields.items(TAPS, int)
  if not ids or min(ids) < 1:
    raise fields.refuse(
      TAPS, ids, "only outputs of layers are read, ids from 1"
    )
  return [number - 1 for number in ids]


def read_head_size(fields: Fields) -> int:
  """V', rows of the draft head; all of the vocabulary where there is no map."""
  return fields.integer("draft_vocab_size", 32000)


@dataclasses.dataclass(frozen=True)
class Serving:
  """What the layout says of a drafter's use.

  Attributes:
    verifier: the target, a hub id or a directory; "" where none is known.
    architectures: of the target, as its config.json names them.
    num_drafts: tokens drafted per round; 0 takes all that a block offers.
  """

  verifier: str = ""
  architectures: tuple[str, ...] = ()
  num_drafts: int = 0


def read_serving(fields: Fields) -> Serving:
  """What config.json says of the drafter's use.

  Raises:
    WeightsError: another way to propose than one greedy chain.
  """
  section = fields.section("speculators_config")
  verifier = section.section("verifier")
  methods = section.items("proposal_methods", dict, [])
  plain = {"proposal_type": "greedy", "verifier_accept_k": 1}
  for method in methods:
    stated = {key: method.get(key, value) for key, value in plain.items()}
    if stated != plain or len(methods) > 1:
      raise section.refuse(
        "proposal_methods",
        methods,
        "only one greedy chain is, accepted where it is the target's choice",
      )
  method = dict(methods[0]) if methods else {}
  proposal = Fields(method, section.source, section.remedy)
  return Serving(
    verifier=verifier.text("name_or_path", ""),
    architectures=tuple(verifier.items("architectures", str, [])),
    num_drafts=proposal.integer("speculative_tokens", 0, least=0),
  )
