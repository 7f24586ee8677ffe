"""What a target is made of, read from its checkpoint: frozen and hashable."""

import dataclasses
from typing import Literal


class ConfigError(ValueError):
  """A configuration that nobody could run; the message names the remedy."""


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
  """How rotary frequencies are stretched past the trained length.

  Attributes:
    kind: "llama3" (Llama 3.1: low frequencies divided by `factor`, a smooth
      ramp between the two frequency factors), "yarn" (Peng et al. 2023,
      arXiv 2309.00071) or "linear" (all frequencies divided by `factor`).
    factor: context extension, > 1.
    original_length: trained context length, in tokens; linear asks for none.
    low_frequency_factor, high_frequency_factor: llama3's ramp.
    beta_fast, beta_slow: yarn's ramp, in rotations over `original_length`.
    attention_factor: yarn's multiplier on cos and sin; None takes the paper's
      0.1 ln(factor) + 1.
    truncate: yarn rounds the ramp's ends to whole frequencies.
  """

  kind: Literal["llama3", "yarn", "linear"]
  factor: float
  original_length: int = 0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Gate:
  """How an mlp opens: what it makes of gate and up before the way down.

  Attributes:
    kind: "silu", silu(gate) up; "gelu_tanh", the same with the tanh form of
      gelu (Gemma); "clamped", gate sigmoid(slope gate) (up + 1), with gate at
      most `limit` and up within it on both sides (gpt-oss).
    slope, limit: of "clamped".
  """

  kind: Literal["silu", "gelu_tanh", "clamped"] = "silu"
  slope: float = 1.702
  limit: float = 7.0


@dataclasses.dataclass(frozen=True)
class Experts:
  """A mixture of experts in the place of a layer's mlp.

  Attributes:
    count: E. top_k: how many each token goes to.
    width: F of one expert.
    renormalize: the weights of the chosen sum to 1, else those of all do.
    bias: the router and the experts' matrices have biases.
    dense_layers: layers that keep an mlp.
  """

  count: int
  top_k: int
  width: int
  renormalize: bool = True
  bias: bool = False
  dense_layers: tuple[int, ...] = ()

  def __post_init__(self):
    if not 1 <= self.top_k <= self.count:
      raise ConfigError(
        f"experts.top_k={self.top_k} is impossible; use 1 to the "
        f"{self.count} experts there are"
      )


@dataclasses.dataclass(frozen=True)
class TargetConfig:
  """A decoder-only target; docs/targets.md says which families it covers.

  Attributes:
    family: which table of tensor names its checkpoints use.
    num_layers: L. width: D. mlp_width: F. num_heads: N. num_kv_heads: G.
    head_width: H. vocab_size: V.
    norm_epsilon: added to the mean square in every RMSNorm.
    rotary_base: theta of the rotary embedding.
    rotary_scaling: None for plain rotary.
    qkv_bias: Qwen2 adds biases to q, k and v.
    qk_norm: Qwen3 applies a per-head RMSNorm to q and k.
    tied_head: the head is the embedding, transposed.
    max_length: trained context length, in tokens.
    eos_ids: tokens that end a reply.
    output_bias: gpt-oss adds one to the attention's output too.
    attention_sinks: of each head, a score that takes its share of the softmax
      and brings no value (gpt-oss).
    layer_windows: per layer, how many last positions a token sees, its own
      included, or 0 for all; () for 0 everywhere.
    local_rotary_base: theta of the layers with a window, whose rotary is not
      stretched; None if all layers share one.
    score_scale: of attention scores; None for 1 / sqrt(H).
    gate: of every mlp and expert.
    experts: in the place of mlps, or None.
    unit_offset: norms multiply by 1 + scale (Gemma).
    post_norms: a norm after each sublayer too, before the residual (Gemma).
    embedding_scale: of the embedding's rows on their way into layer 0; those
      that a drafter borrows are not scaled.
  """

  family: Literal[
    "llama", "qwen2", "qwen3", "qwen3_moe", "gpt_oss", "gemma3_text"
  ]
  num_layers: int
  width: int
  mlp_width: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  vocab_size: int
  norm_epsilon: float = 1e-5
  rotary_base: float = 10000.0
  rotary_scaling: RotaryScaling | None = None
  qkv_bias: bool = False
  qk_norm: bool = False
  tied_head: bool = False
  max_length: int = 2048
  eos_ids: tuple[int, ...] = ()
  output_bias: bool = False
  attention_sinks: bool = False
  layer_windows: tuple[int, ...] = ()
  local_rotary_base: float | None = None
  score_scale: float | None = None
  gate: Gate = Gate()
  experts: Experts | None = None
  unit_offset: bool = False
  post_norms: bool = False
  embedding_scale: float = 1.0

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_heads={self.num_heads} is not a multiple of "
        f"num_kv_heads={self.num_kv_heads}"
      )
    if self.head_width % 2:
      raise ConfigError(f"head_width={self.head_width} must be even for rotary")
    if self.layer_windows and len(self.layer_windows) != self.num_layers:
      raise ConfigError(
        f"layer_windows has {len(self.layer_windows)} entries for "
        f"num_layers={self.num_layers}"
      )

  def window(self, layer: int) -> int | None:
    """How many last positions a token of a layer sees; None for all."""
    return self.layer_windows[layer] or None if self.layer_windows else None

  def has_experts(self, layer: int) -> bool:
    """Whether a layer has experts in the place of an mlp."""
    experts = self.experts
    return experts is not None and layer not in experts.dense_layers
