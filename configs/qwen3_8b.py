r"""Qwen3-8B with the published DFlash settings.

    python -m dflash_jax --config=configs/qwen3_8b.py \
        --drafter=Qwen3-8B-DFlash-b16 --prompt "Is 91 prime? /no_think"

--drafter names a local copy of z-lab/Qwen3-8B-DFlash-b16, which was trained on
replies without thinking: end prompts with /no_think. To train one:

    python -m train.synthesize --config=configs/qwen3_8b.py \
        --config.synthesis.prompts='("prompts.jsonl",)'
    python -m train.main --config=configs/qwen3_8b.py --workdir=runs/qwen3_8b

Published, not measured here (arXiv 2602.06036, temperature 0, thinking off,
block 16): tau 6.54 and 5.15x on GSM8K, 7.87 and 6.08x on MATH-500, 6.50 and
5.14x on HumanEval, 4.24 and 2.75x on MT-Bench. The drafter has 1,048,626,432
parameters.

The recipe: about 800,000 prompts (Nemotron Post-Training V2, CodeAlpaca), each
answered by the target, for six epochs. The paper does not give its batch; this
one is that of SpecForge's public recipe, four sequences on each of eight GPUs.
Each GPU takes its four one after the other, so that a sequence need not pass
through the drafter a second time to save memory: 43 GB beside the target. Where
that is too much, set train.anchor_chunk=64 and train.loss_chunk=128.
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
ROWS = 4  # of them on each GPU


def get_config() -> Config:
  """Five layers of the target's shape, taps 1, 9, 17, 25, 33, block 16."""
  return Config(
    name="qwen3_8b",
    target=TargetSource(path="Qwen/Qwen3-8B", dtype="bfloat16"),
    drafter=DraftConfig(
      num_layers=5,
      block_size=16,
      num_taps=5,
      mask_token_id=151669,  # the row after the last token of the tokenizer
    ),
    decode=DecodeConfig(max_new_tokens=2048, max_length=4096),
    synthesis=SynthesisConfig(
      output="corpus/qwen3_8b",
      max_prompt_tokens=1024,
      max_answer_tokens=2048,
      held_out=0.001,
    ),
    train=TrainConfig(
      corpus=("corpus/qwen3_8b",),
      steps=PROMPTS * EPOCHS // BATCH_SIZE,
      batch_size=BATCH_SIZE,
      accumulate=ROWS,
      sequence_length=3072,
      num_anchors=512,
      slot_weights="decay",  # with the paper's decay for block 16, gamma 7
      learning_rate=6e-4,
      loss_chunk=512,
      evaluate_every=2000,
      checkpoint_every=2000,
    ),
    eval=EvalConfig(limit=128, max_new_tokens=2048),
  )
