"""What a drafter is made of, read from its checkpoint: frozen and hashable."""

import dataclasses
from typing import Literal

from dflash_jax.target_network import ConfigError as ConfigError
from dflash_jax.target_network import RotaryScaling as RotaryScaling
from dflash_jax.target_network import TargetConfig as TargetConfig


@dataclasses.dataclass(frozen=True)
class Convolution:
  """DFlash 2's convolutions around both sublayers of every draft layer.

  Attributes:
    kernel_size: slots a channel sees, its own included.
    group_size: channels that share the part of a kernel that tokens choose.
  """

  kernel_size: int = 2
  group_size: int = 16


@dataclasses.dataclass(frozen=True)
class Selector:
  """DFlash 2's choice among the likeliest tokens of a slot.

  Attributes:
    rank: of the two tables. top_k: candidates of a slot.
  """

  rank: int = 256
  top_k: int = 16


@dataclasses.dataclass(frozen=True)
class Markov:
  """DSpark's bias by the token before.

  Attributes:
    rank: of the two tables.
    kind: what the bias sees: "vanilla" the token before; "gated" the slot's
      state too; "rnn" all tokens before, in a state of its own.
  """

  rank: int = 256
  kind: Literal["vanilla", "gated", "rnn"] = "vanilla"


@dataclasses.dataclass(frozen=True)
class Gru:
  """Domino's correction by all tokens before.

  Attributes:
    state_width: of the GRU. width: between its two matrices.
    plain_slots: first predictions that stay as they are.
  """

  state_width: int = 1024
  width: int = 256
  plain_slots: int = 1


@dataclasses.dataclass(frozen=True)
class Confidence:
  """DSpark's estimate of each draft's chance of acceptance.

  Attributes:
    sees_token: whether it reads the Markov table's row of the token before.
  """

  sees_token: bool = True


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
  """A DFlash drafter, with the meaning of its published config keys.

  DFlash 2, DSpark and Domino are this one with parts added: `convolution` and
  `selector`; `anchor_predicts`, `markov` and `confidence`; `gru`.

  Attributes:
    num_layers: draft layers. width: D of the drafter (its own residual width;
      equals the target's, whose embedding and head it borrows).
    mlp_width: F. num_heads: N. num_kv_heads: G. head_width: H.
    vocab_size: V, the target's.
    block_size: K, anchor included; a block offers K - 1 drafts.
    mask_token_id: the target's embedding row that stands for "unknown".
    target_layer_ids: taps, 0-based layers whose output is read.
    num_target_layers: depth of the target it was trained for; 0 where its
      checkpoint does not say.
    target_width: D of the target.
    norm_epsilon: as in the target.
    rotary_base: must equal the target's. rotary_scaling: usually None.
    layer_windows: per layer, a sliding window in tokens, or 0 for none.
    layer_causal: per layer, whether block slot i sees only slots <= i.
    input_embedding_scale: multiplies embedding rows.
    output_multiplier: multiplies logits.
    logit_softcap: tanh softcap of logits, or None.
    max_length: longest position the drafter was meant for.
    anchor_predicts: slot k drafts the token after its own, so that the anchor
      drafts too and a block offers K drafts.
    convolution, selector, markov, gru, confidence: parts, or None.
  """

  num_layers: int
  width: int
  mlp_width: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  vocab_size: int
  block_size: int
  mask_token_id: int
  target_layer_ids: tuple[int, ...]
  num_target_layers: int
  target_width: int
  norm_epsilon: float = 1e-6
  rotary_base: float = 10000.0
  rotary_scaling: RotaryScaling | None = None
  layer_windows: tuple[int, ...] = ()
  layer_causal: tuple[bool, ...] = ()
  input_embedding_scale: float = 1.0
  output_multiplier: float = 1.0
  logit_softcap: float | None = None
  max_length: int = 2048
  anchor_predicts: bool = False
  convolution: Convolution | None = None
  selector: Selector | None = None
  markov: Markov | None = None
  gru: Gru | None = None
  confidence: Confidence | None = None

  def __post_init__(self):
    if not self.layer_windows:
      object.__setattr__(self, "layer_windows", (0,) * self.num_layers)
    if not self.layer_causal:
      object.__setattr__(self, "layer_causal", (False,) * self.num_layers)
    for name in ("layer_windows", "layer_causal"):
      if len(getattr(self, name)) != self.num_layers:
        raise ConfigError(
          f"{name} has {len(getattr(self, name))} entries for "
          f"num_layers={self.num_layers}"
        )
    if self.block_size < 2:
      raise ConfigError(
        f"block_size={self.block_size} drafts nothing; use at least 2"
      )
    if not 0 <= self.mask_token_id < self.vocab_size:
      raise ConfigError(
        f"mask_token_id={self.mask_token_id} is outside the vocabulary of "
        f"{self.vocab_size}"
      )
    self._check_parts()
    depth = self.num_target_layers or 1 + max(self.target_layer_ids, default=0)
    for tap in self.target_layer_ids:
      if not 0 <= tap < depth:
        raise ConfigError(
          f"tap {tap} is outside the target's layers 0...{depth - 1}; choose "
          "target_layer_ids in range"
        )

  @property
  def num_drafts(self) -> int:
    """Predictions of a block."""
    return self.block_size - (0 if self.anchor_predicts else 1)

  @property
  def corrects(self) -> bool:
    """Whether a slot's logits depend on the tokens drafted before it."""
    return any((self.selector, self.markov, self.gru))

  def _check_parts(self) -> None:
    """Raises ConfigError for parts that do not fit each other."""
    parts = [
      name for name in ("selector", "markov", "gru") if getattr(self, name)
    ]
    if len(parts) > 1:
      raise ConfigError(
        f"{' and '.join(parts)} would both correct the same logits; keep one"
      )
    if self.convolution and self.width % self.convolution.group_size:
      raise ConfigError(
        f"convolution.group_size={self.convolution.group_size} does not divide "
        f"width={self.width}; choose a divisor"
      )
    if self.selector and not 1 <= self.selector.top_k <= self.vocab_size:
      raise ConfigError(
        f"selector.top_k={self.selector.top_k} is impossible; use 1 to the "
        f"vocabulary's {self.vocab_size}"
      )
    if self.confidence and self.confidence.sees_token and not self.markov:
      raise ConfigError(
        "confidence.sees_token reads a Markov table, and there is none; add "
        "markov or set confidence.sees_token=False"
      )

  def check_target(self, target: TargetConfig) -> None:
    """Raises ConfigError, naming both numbers, if `target` does not fit."""
    for misfit in self.misfits(target):
      raise ConfigError(misfit)

  def misfits(self, target: TargetConfig) -> list[str]:
    """Why `target` does not fit, naming both numbers each time."""
    depth = self.num_target_layers or target.num_layers
    return _compare(
      {
        "width of the target": (self.target_width, target.width),
        "vocabulary": (self.vocab_size, target.vocab_size),
        "target layers": (depth, target.num_layers),
        "drafter width (it borrows the target's head)": (
          self.width,
          target.width,
        ),
      }
    ) + _compare_taps(self.target_layer_ids, target)


def _compare(pairs: dict[str, tuple[int, int]]) -> list[str]:
  """A complaint for each pair of a drafter's number and its target's."""
  return [
    f"drafter and target do not match: {what} is {ours} in the drafter and "
    f"{theirs} in the target; use the drafter trained for this target"
    for what, (ours, theirs) in pairs.items()
    if ours != theirs
  ]


def _compare_taps(taps: tuple[int, ...], target: TargetConfig) -> list[str]:
  """A complaint for each tap that the target does not have."""
  return [
    f"tap {tap} is outside the target's layers 0...{target.num_layers - 1}; "
    "use the drafter trained for this target"
    for tap in taps
    if not 0 <= tap < target.num_layers
  ]


@dataclasses.dataclass(frozen=True)
class Eagle3Config:
  """An EAGLE-3 drafter of one layer.

  Attributes:
    width: D. mlp_width: F. num_heads: N. num_kv_heads: G. head_width: H.
    vocab_size: V, the target's. draft_vocab_size: V', of its own head.
    target_layer_ids: taps, 0-based layers whose output is read, low to high.
    target_width: D of the target.
    norm_epsilon, rotary_base, rotary_scaling: of the layer.
    norm_before_residual: the residual is the normed hidden state.
    own_embedding: it brings one; else the target's, of the same width.
    max_length: longest position it was meant for.
  """

  width: int
  mlp_width: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  vocab_size: int
  draft_vocab_size: int
  target_layer_ids: tuple[int, ...]
  target_width: int
  norm_epsilon: float = 1e-5
  rotary_base: float = 10000.0
  rotary_scaling: RotaryScaling | None = None
  norm_before_residual: bool = False
  own_embedding: bool = False
  max_length: int = 2048

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_heads={self.num_heads} is not a multiple of "
        f"num_kv_heads={self.num_kv_heads}"
      )
    if self.head_width % 2:
      raise ConfigError(f"head_width={self.head_width} must be even for rotary")
    if not 1 <= self.draft_vocab_size <= self.vocab_size:
      raise ConfigError(
        f"draft_vocab_size={self.draft_vocab_size} is impossible; use 1 to the "
        f"vocabulary's {self.vocab_size}"
      )

  def check_target(self, target: TargetConfig) -> None:
    """Raises ConfigError, naming both numbers, if `target` does not fit."""
    for misfit in self.misfits(target):
      raise ConfigError(misfit)

  def misfits(self, target: TargetConfig) -> list[str]:
    """Why `target` does not fit, naming both numbers each time."""
    pairs = {
      "width of the target": (self.target_width, target.width),
      "vocabulary": (self.vocab_size, target.vocab_size),
    }
    if not self.own_embedding:
      borrowed = (self.width, target.width)
      pairs["drafter width (it borrows the target's embedding)"] = borrowed
    return _compare(pairs) + _compare_taps(self.target_layer_ids, target)
