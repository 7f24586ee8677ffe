"""The drafter that a config asks for, on the target it is for."""

import dataclasses
from typing import Any, cast

from dflash_jax.config import (
  Config,
  ConfigError,
  DraftConfig,
  DrafterConfig,
  TargetConfig,
)
from dflash_jax.drafters import DFlash, Eagle3, LanguageModel
from dflash_jax.features import choose_eagle3_taps, choose_taps
from dflash_jax.networks import (
  Confidence,
  Convolution,
  Eagle3Config,
  Gru,
  Markov,
  Selector,
)

Network = DrafterConfig | Eagle3Config | TargetConfig
Trainable = DFlash | Eagle3 | LanguageModel

_MARKOV_KINDS = ("vanilla", "gated", "rnn")
_LEAST = {
  "convolution_kernel": 0,
  "convolution_group": 1,
  "selector_rank": 0,
  "markov_rank": 0,
  "gru_width": 0,
  "gru_rank": 1,
  "plain_slots": 0,
}


def make_drafter(draft: DraftConfig, network: Network) -> Trainable:
  """The formulas of a network that `design_drafter` has drawn up."""
  if isinstance(network, DrafterConfig):
    return DFlash(network)
  num_drafts = draft.block_size - 1
  if isinstance(network, Eagle3Config):
    return Eagle3(network, num_drafts)
  return LanguageModel(network, num_drafts, borrows=not draft.lm_width)


def design_drafter(config: Config, target: TargetConfig) -> Network:
  """The architecture config.drafter asks for, on this target.

  Raises:
    ConfigError: for a name that cannot be trained, a tap out of range, a mask
      token outside the vocabulary, or parts that do not fit.
  """
  draft = config.drafter
  if draft.name not in ("eagle3", "lm"):
    return _design_blocks(draft, target)
  if draft.block_size < 2:
    raise ConfigError(
      f"drafter.block_size={draft.block_size} drafts nothing; use at least 2"
    )
  design = _design_eagle3 if draft.name == "eagle3" else _design_lm
  return design(draft, target)


def _size_layers(draft: DraftConfig, target: TargetConfig) -> dict[str, Any]:
  """What all kinds of drafters say of a layer, and of the text."""
  return {
    "mlp_width": draft.mlp_width or target.mlp_width,
    "num_heads": draft.num_heads or target.num_heads,
    "num_kv_heads": draft.num_kv_heads or target.num_kv_heads,
    "head_width": draft.head_width or target.head_width,
    "vocab_size": target.vocab_size,
    "norm_epsilon": target.norm_epsilon,
    "rotary_base": target.rotary_base,
    "max_length": target.max_length,
  }


def _design_blocks(draft: DraftConfig, target: TargetConfig) -> DrafterConfig:
  """DFlash and its variants."""
  parts = _design_parts(draft)
  try:
    taps = draft.taps or choose_taps(target.num_layers, draft.num_taps)
  except ValueError as error:
    raise ConfigError(f"drafter: {error}") from error
  return DrafterConfig(
    num_layers=draft.num_layers,
    width=target.width,
    block_size=draft.block_size,
    mask_token_id=draft.mask_token_id,
    target_layer_ids=tuple(taps),
    num_target_layers=target.num_layers,
    target_width=target.width,
    layer_windows=tuple(draft.layer_windows),
    layer_causal=tuple(draft.layer_causal),
    **_size_layers(draft, target),
    **parts,
  )


def _design_eagle3(draft: DraftConfig, target: TargetConfig) -> Eagle3Config:
  """One layer on the target's embedding, with a head of its own."""
  if draft.num_layers != 1:
    raise ConfigError(
      f"drafter.num_layers={draft.num_layers}, and eagle3 has one layer; use "
      "1, and drafter.mlp_width for its size"
    )
  try:
    taps = draft.taps or choose_eagle3_taps(target.num_layers)
  except ConfigError as error:
    raise ConfigError(
      f"drafter.taps is empty, and a target of {target.num_layers} layers is "
      "too shallow for EAGLE-3's published taps, which need 7; name three in "
      "drafter.taps"
    ) from error
  for tap in taps:
    if not 0 <= tap < target.num_layers:
      raise ConfigError(
        f"tap {tap} is outside the target's layers 0...{target.num_layers - 1};"
        " choose drafter.taps in range"
      )
  return Eagle3Config(
    width=target.width,
    draft_vocab_size=draft.draft_vocabulary or target.vocab_size,
    target_layer_ids=tuple(taps),
    target_width=target.width,
    **_size_layers(draft, target),
  )


def _design_lm(draft: DraftConfig, target: TargetConfig) -> TargetConfig:
  """A smaller one of the target's family."""
  if draft.draft_vocabulary:
    raise ConfigError(
      f"drafter.draft_vocabulary={draft.draft_vocabulary} would trim the head "
      "of a whole language model; use 0"
    )
  if draft.num_layers < 1 or draft.lm_width < 0:
    raise ConfigError(
      f"drafter.num_layers={draft.num_layers} and "
      f"drafter.lm_width={draft.lm_width} are no network; use at least 1 layer "
      "and a width of at least 0"
    )
  if target.experts or target.attention_sinks or any(target.layer_windows):
    raise ConfigError(
      f"drafter.name=lm draws up a smaller {target.family}, and one with "
      "experts, sinks or windows is not trained here; name a published model "
      "in --drafter, or train another drafter"
    )
  return dataclasses.replace(
    target,
    num_layers=draft.num_layers,
    width=draft.lm_width or target.width,
    tied_head=draft.lm_width > 0 or target.tied_head,
    **_size_layers(draft, target),
  )


def _design_parts(draft: DraftConfig) -> dict[str, Any]:
  """The parts that the drafter's name brings, less those of size 0."""
  for name, least in _LEAST.items():
    if (size := getattr(draft, name)) < least:
      remedy = "at least 1" if least else "0 to leave the part out"
      raise ConfigError(f"drafter.{name}={size} is impossible; use {remedy}")
  parts: dict[str, Any] = {}
  if draft.name == "dflash2":
    if draft.convolution_kernel:
      parts["convolution"] = Convolution(
        draft.convolution_kernel, draft.convolution_group
      )
    if draft.selector_rank:
      parts["selector"] = Selector(draft.selector_rank, draft.selector_top_k)
  elif draft.name == "dspark":
    parts["anchor_predicts"] = draft.anchor_predicts
    if draft.markov_rank:
      kind = cast(Any, _check_kind(draft.markov_kind))
      parts["markov"] = Markov(draft.markov_rank, kind)
    if draft.confidence:
      parts["confidence"] = Confidence(sees_token=draft.markov_rank > 0)
  elif draft.name == "domino":
    parts["anchor_predicts"] = draft.anchor_predicts
    if draft.gru_width:
      parts["gru"] = Gru(draft.gru_width, draft.gru_rank, draft.plain_slots)
  elif draft.name != "dflash":
    raise ConfigError(
      f"drafter.name={draft.name!r} cannot be trained; choose 'dflash', "
      "'dflash2', 'dspark', 'domino', 'eagle3' or 'lm'"
    )
  return parts


def _check_kind(kind: str) -> str:
  if kind not in _MARKOV_KINDS:
    raise ConfigError(
      f"drafter.markov_kind={kind!r} is unknown; choose "
      f"{' or '.join(map(repr, _MARKOV_KINDS))}"
    )
  return kind
