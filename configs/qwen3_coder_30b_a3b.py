r"""Qwen3-Coder-30B-A3B-Instruct, 128 experts of which each token takes 8.

    python -m dflash_jax --config=configs/qwen3_coder_30b_a3b.py \
        --drafter=Qwen3-Coder-30B-A3B-DFlash --prompt "Sort a list in Rust."

--drafter names a local copy of z-lab/Qwen3-Coder-30B-A3B-DFlash. To train one:

    python -m train.synthesize --config=configs/qwen3_coder_30b_a3b.py \
        --config.synthesis.prompts='("prompts.jsonl",)'
    python -m train.main --config=configs/qwen3_coder_30b_a3b.py \
        --workdir=runs/qwen3_coder_30b_a3b

Nothing was measured here: in bfloat16 the target takes 61 GB. The published
drafter was trained on 289,000 prompts, most of them code; the recipe below is
that of configs/qwen3_8b.py. See docs/targets.md for what experts cost a round.
"""

from dflash_jax.config import (
  Config,
  DecodeConfig,
  DraftConfig,
  EvalConfig,
  SynthesisConfig,
  TargetSource,
  TrainConfig,
)

PROMPTS = 289_000
EPOCHS = 6
BATCH_SIZE = 32


def get_config() -> Config:
  """Five dense layers, taps 1, 12, 23, 34, 45, block 16."""
  return Config(
    name="qwen3_coder_30b_a3b",
    target=TargetSource(
      path="Qwen/Qwen3-Coder-30B-A3B-Instruct", dtype="bfloat16"
    ),
    drafter=DraftConfig(
      num_layers=5,
      block_size=16,
      num_taps=5,
      mlp_width=6144,  # three times the width; the target's own is unused
      mask_token_id=151669,  # the row after the last token of the tokenizer
    ),
    decode=DecodeConfig(max_new_tokens=2048, max_length=4096),
    synthesis=SynthesisConfig(
      output="corpus/qwen3_coder_30b_a3b",
      max_prompt_tokens=1024,
      max_answer_tokens=2048,
      held_out=0.001,
    ),
    train=TrainConfig(
      corpus=("corpus/qwen3_coder_30b_a3b",),
      steps=PROMPTS * EPOCHS // BATCH_SIZE,
      batch_size=BATCH_SIZE,
      sequence_length=3072,
      num_anchors=512,
      anchor_chunk=32,
      slot_weights="decay",
      learning_rate=6e-4,
      loss_chunk=128,
      evaluate_every=2000,
      checkpoint_every=2000,
    ),
    eval=EvalConfig(limit=128, max_new_tokens=2048),
  )
