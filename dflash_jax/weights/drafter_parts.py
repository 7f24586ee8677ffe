"""The keys of config.json that say what a drafter has besides DFlash's layers.

DFlash 2 is known by its architecture, DSpark and Domino by `projector_type`
too. A mixture that no other engine knows goes under a name of its own, so that
they refuse it instead of misreading it.
"""

import dataclasses
from typing import Any

from dflash_jax.config import DrafterConfig
from dflash_jax.networks import (
  Confidence,
  Convolution,
  Gru,
  Markov,
  Selector,
)
from dflash_jax.weights.fields import Fields

DFLASH = "DFlashDraftModel"
DFLASH2 = "DFlash2DraftModel"
DSPARK = "DSparkDraftModel"
DOMINO = "DominoDraftModel"
MIXED = "DFlashMixedDraftModel"
_DEEPSPEC = "Qwen3DSparkModel"
ARCHITECTURES = (DFLASH, DFLASH2, DSPARK, DOMINO, MIXED, _DEEPSPEC)

# The Python module that exporters name beside the architecture.
MODULES = {
  DFLASH: "dflash",
  DFLASH2: "dflash",
  DSPARK: "dspark",
  DOMINO: "domino",
  MIXED: "dflash",
}
_PROJECTORS = {DSPARK: "dspark", _DEEPSPEC: "dspark", DOMINO: "domino"}

# Three spellings of one thing: the anchor's slot predicts too.
_ANCHOR_KEYS = (
  "sample_from_anchor",
  "shift_label",
  "query_zero_predicts_next",
)


def read_parts(
  fields: Fields, architecture: str, confidence_width: int | None
) -> dict[str, Any]:
  """The fields of DrafterConfig that parts add.

  Args:
    fields: config.json.
    architecture: one of ARCHITECTURES.
    confidence_width: input of the stored confidence head, None without one;
      some exporters do not say what it reads.
  """
  projector = _read_projector(fields, architecture)
  markov = _read_markov(fields)
  return {
    "anchor_predicts": _read_anchor(fields, projector, markov),
    "convolution": _read_convolution(fields, architecture),
    "selector": _read_selector(fields, architecture),
    "markov": markov,
    "gru": _read_gru(fields, projector),
    "confidence": _read_confidence(fields, confidence_width),
  }


def _read_projector(fields: Fields, architecture: str) -> str:
  """What corrects the logits: "dspark", "domino", or "" for neither."""
  implied = _PROJECTORS.get(architecture, "")
  if fields.raw("projector_type") is None:
    return implied
  stated = fields.text("projector_type")
  allowed = (implied,) if implied else ("dspark", "domino")
  if stated not in allowed:
    raise fields.refuse(
      "projector_type", stated, f"{architecture} may have {allowed}"
    )
  return stated


def _read_anchor(fields: Fields, projector: str, markov: Markov | None) -> bool:
  stated = {
    key: fields.flag(key, False)
    for key in _ANCHOR_KEYS
    if fields.raw(key) is not None
  }
  if len(set(stated.values())) > 1:
    raise fields.fault(_ANCHOR_KEYS[0], f"contradicts itself: {stated}")
  if stated:
    return next(iter(stated.values()))
  if markov and not projector:
    raise fields.fault(
      _ANCHOR_KEYS[0], "is missing, and a Markov head alone does not tell"
    )
  return projector == "dspark"


def _asked(fields: Fields, *keys: str) -> bool:
  return any(fields.raw(key) is not None for key in keys)


def _read_convolution(fields: Fields, architecture: str) -> Convolution | None:
  keys = ("conv_kernel_size", "conv_group_size")
  if architecture != DFLASH2 and not _asked(fields, *keys):
    return None
  return Convolution(*(fields.integer(key) for key in keys))


def _read_selector(fields: Fields, architecture: str) -> Selector | None:
  keys = ("selector_rank", "selector_top_k")
  if architecture != DFLASH2 and not _asked(fields, *keys):
    return None
  return Selector(*(fields.integer(key) for key in keys))


def _read_markov(fields: Fields) -> Markov | None:
  rank = fields.integer("markov_rank", 0, least=0)
  if not rank:
    return None
  match kind := fields.text("markov_head_type", "vanilla").lower():
    case "vanilla" | "gated" | "rnn":
      return Markov(rank, kind)
  raise fields.refuse(
    "markov_head_type", kind, "supported: vanilla, gated, rnn"
  )


def _read_gru(fields: Fields, projector: str) -> Gru | None:
  if projector != "domino" and not _asked(fields, "gru_hidden_dim"):
    return None
  return Gru(
    state_width=fields.integer("gru_hidden_dim"),
    width=fields.integer("emb_dim"),
    plain_slots=fields.integer("pure_draft_prefix_len", 0, least=0),
  )


def _read_confidence(fields: Fields, width: int | None) -> Confidence | None:
  weighted = fields.number("confidence_head_alpha", 0.0) > 0
  on = fields.flag("use_confidence_head", weighted)
  if not fields.flag("enable_confidence_head", on):
    return None
  wide = width is not None and width > fields.integer("hidden_size")
  return Confidence(fields.flag("confidence_head_with_markov", wide))


def architecture_of(config: DrafterConfig) -> str:
  """The architecture under which engines know these parts, or MIXED."""
  present = {
    part.name
    for part in dataclasses.fields(config)
    if part.name in ("convolution", "selector", "markov", "gru", "confidence")
    and getattr(config, part.name)
  }
  if not present:
    return MIXED if config.anchor_predicts else DFLASH
  if present == {"convolution", "selector"} and not config.anchor_predicts:
    return DFLASH2
  if present <= {"markov", "confidence"}:
    return DSPARK
  return DOMINO if present == {"gru"} else MIXED


def part_fields(config: DrafterConfig) -> tuple[dict[str, Any], dict[str, Any]]:
  """Keys of parts at the top level and in `dflash_config`; see `read_parts`."""
  architecture = architecture_of(config)
  top: dict[str, Any] = {}
  nested: dict[str, Any] = {}
  if architecture not in (DFLASH, DFLASH2):
    nested |= dict.fromkeys(_ANCHOR_KEYS[:2], config.anchor_predicts)
  if architecture in _PROJECTORS:
    nested["projector_type"] = _PROJECTORS[architecture]
  if config.convolution:
    nested["conv_kernel_size"] = config.convolution.kernel_size
    nested["conv_group_size"] = config.convolution.group_size
  if config.selector:
    nested["selector_rank"] = config.selector.rank
    nested["selector_top_k"] = config.selector.top_k
  if architecture == DSPARK:
    heads = (config.num_heads, config.num_kv_heads)
    nested["attention_mode"] = "mha" if len(set(heads)) == 1 else "gqa"
    nested["markov_rank"] = 0
  if config.markov:
    nested["markov_rank"] = config.markov.rank
    nested["markov_head_type"] = config.markov.kind
  if config.confidence:
    nested["enable_confidence_head"] = True
    nested["confidence_head_with_markov"] = config.confidence.sees_token
  if config.gru:
    nested["gru_hidden_dim"] = config.gru.state_width
    nested["emb_dim"] = config.gru.width
    nested["pure_draft_prefix_len"] = config.gru.plain_slots
    top["emb_dim"] = config.gru.width  # engines look for it here
  return top, nested
