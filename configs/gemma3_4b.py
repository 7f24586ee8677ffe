r"""Gemma 3 4B: five layers with a window of 1024 tokens to each without.

    python -m train.synthesize --config=configs/gemma3_4b.py \
        --config.synthesis.prompts='("prompts.jsonl",)'
    python -m train.main --config=configs/gemma3_4b.py --workdir=runs/gemma3_4b

The target's weights are behind Google's licence on the hub; the vision tower
beside them is not read. No DFlash drafter of it is published as far as is known
here, and nothing was measured: a drafter is to be trained. The recipe is that
of configs/qwen3_8b.py.

The mask is <mask>, which the tokenizer has and no text contains.
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

PROMPTS = 800_000
EPOCHS = 6
BATCH_SIZE = 32


def get_config() -> Config:
  """Five layers of the target's shape, taps 1, 8, 16, 24, 31, block 16."""
  return Config(
    name="gemma3_4b",
    target=TargetSource(path="google/gemma-3-4b-it", dtype="bfloat16"),
    drafter=DraftConfig(
      num_layers=5,
      block_size=16,
      num_taps=5,
      mask_token_id=4,
    ),
    decode=DecodeConfig(max_new_tokens=2048, max_length=4096),
    synthesis=SynthesisConfig(
      output="corpus/gemma3_4b",
      max_prompt_tokens=1024,
      max_answer_tokens=2048,
      held_out=0.001,
    ),
    train=TrainConfig(
      corpus=("corpus/gemma3_4b",),
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
