r"""Llama-3.1-8B-Instruct with the published DFlash settings.

    python -m dflash_jax --config=configs/llama31_8b.py \
        --drafter=LLaMA3.1-8B-Instruct-DFlash-UltraChat --prompt "Hello!"

--drafter names a local copy of z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat; the
target's own weights are behind Meta's licence on the hub. To train one:

    python -m train.synthesize --config=configs/llama31_8b.py \
        --config.synthesis.prompts='("prompts.jsonl",)'
    python -m train.main --config=configs/llama31_8b.py --workdir=runs/llama31

Published, not measured here (arXiv 2602.06036, temperature 0, block 10): tau
4.32 on GSM8K, 4.91 on HumanEval and 3.73 on Alpaca; 2.4x at concurrency 1. It
was trained on EAGLE-3's prompts (ShareGPT and UltraChat-200k), to be compared
with it; what follows in `train` is the paper's recipe for its other targets,
and gamma 5 for block 10.

The mask is <|reserved_special_token_0|>, 128002: no text, chat template or
tool call of Llama 3.1 contains it, so it can stand for nothing else. Padding
(128004) would not do, for it does occur, and 128008 to 128010 end messages and
call tools.
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

PROMPTS = 270_000  # about 70,000 of ShareGPT and 200,000 of UltraChat
EPOCHS = 6
BATCH_SIZE = 32


def get_config() -> Config:
  """Five layers of the target's shape, taps 1, 8, 15, 22, 29, block 10."""
  return Config(
    name="llama31_8b",
    target=TargetSource(
      path="meta-llama/Llama-3.1-8B-Instruct", dtype="bfloat16"
    ),
    drafter=DraftConfig(
      num_layers=5,
      block_size=10,
      num_taps=5,
      mask_token_id=128002,
    ),
    decode=DecodeConfig(max_new_tokens=2048, max_length=4096),
    synthesis=SynthesisConfig(
      output="corpus/llama31_8b",
      max_prompt_tokens=1024,
      max_answer_tokens=2048,
      held_out=0.001,
    ),
    train=TrainConfig(
      corpus=("corpus/llama31_8b",),
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
