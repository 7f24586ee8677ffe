"""The drafter that a config asks for, on the target it is for."""

from typing import Any, cast

from dflash_jax.config import (
  Config,
  ConfigError,
  DraftConfig,
  DrafterConfig,
  TargetConfig,
)
from dflash_jax.features import choose_taps
from dflash_jax.networks import Confidence, Convolution, Gru, Markov, Selector

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


def design_drafter(config: Config, target: TargetConfig) -> DrafterConfig:
  """The architecture config.drafter asks for, on this target.

  Raises:
    ConfigError: for a name that cannot be trained, a tap out of range, a mask
      token outside the vocabulary, or parts that do not fit.
  """
  draft = config.drafter
  parts = _design_parts(draft)
  try:
    taps = draft.taps or choose_taps(target.num_layers, draft.num_taps)
  except ValueError as error:
    raise ConfigError(f"drafter: {error}") from error
  return DrafterConfig(
    num_layers=draft.num_layers,
    width=target.width,
    mlp_width=draft.mlp_width or target.mlp_width,
    num_heads=draft.num_heads or target.num_heads,
    num_kv_heads=draft.num_kv_heads or target.num_kv_heads,
    head_width=draft.head_width or target.head_width,
    vocab_size=target.vocab_size,
    block_size=draft.block_size,
    mask_token_id=draft.mask_token_id,
    target_layer_ids=tuple(taps),
    num_target_layers=target.num_layers,
    target_width=target.width,
    norm_epsilon=target.norm_epsilon,
    rotary_base=target.rotary_base,
    layer_windows=tuple(draft.layer_windows),
    layer_causal=tuple(draft.layer_causal),
    max_length=target.max_length,
    **parts,
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
      "'dflash2', 'dspark' or 'domino'"
    )
  return parts


def _check_kind(kind: str) -> str:
  if kind not in _MARKOV_KINDS:
    raise ConfigError(
      f"drafter.markov_kind={kind!r} is unknown; choose "
      f"{' or '.join(map(repr, _MARKOV_KINDS))}"
    )
  return kind
