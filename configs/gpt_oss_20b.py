r"""gpt-oss-20b, its experts read from 4 bits.

    python -m dflash_jax --config=configs/gpt_oss_20b.py \
        --drafter=gpt-oss-20b-DFlash --prompt "How many divisors has 196?"

--drafter names a local copy of z-lab/gpt-oss-20b-DFlash. To train one:

    python -m train.synthesize --config=configs/gpt_oss_20b.py \
        --config.synthesis.prompts='("prompts.jsonl",)'
    python -m train.main --config=configs/gpt_oss_20b.py \
        --workdir=runs/gpt_oss_20b

Nothing was measured here: decoded to bfloat16 the target takes 42 GB. The
published drafter was trained on 800,000 prompts, answered by the target; the
recipe below is that of configs/qwen3_8b.py.

The mask is <|reserved_200000|>: no text and no Harmony message contains it.
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
  """Five dense layers, taps 1, 6, 11, 16, 21, block 8."""
  return Config(
    name="gpt_oss_20b",
    target=TargetSource(path="openai/gpt-oss-20b", dtype="bfloat16"),
    drafter=DraftConfig(
      num_layers=5,
      block_size=8,
      num_taps=5,
      mlp_width=8640,  # three times the width: the target has only experts'
      mask_token_id=200000,
    ),
    decode=DecodeConfig(max_new_tokens=2048, max_length=4096),
    synthesis=SynthesisConfig(
      output="corpus/gpt_oss_20b",
      max_prompt_tokens=1024,
      max_answer_tokens=2048,
      held_out=0.001,
    ),
    train=TrainConfig(
      corpus=("corpus/gpt_oss_20b",),
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
