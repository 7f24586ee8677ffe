"""Random weights and one token per byte: the whole flow on a CPU in a minute.

    python -m train.synthesize --config=configs/tiny.py
    python -m train.main --config=configs/tiny.py --workdir=runs/tiny
    python -m dflash_jax --config=configs/tiny.py --prompt "Hello!"

The text is noise, and a drafter has nothing to learn from it but the flow:
tau stays near 1.
"""

from dflash_jax.byte_tokenizer import MASK_TOKEN_ID, VOCAB_SIZE
from dflash_jax.config import (
  Config,
  DecodeConfig,
  DraftConfig,
  EvalConfig,
  SynthesisConfig,
  TargetConfig,
  TargetSource,
  TrainConfig,
)


def get_config() -> Config:
  """Five layers, 64 wide; a drafter of two."""
  return Config(
    name="tiny",
    target=TargetSource(
      random=TargetConfig(
        family="llama",
        num_layers=5,
        width=64,
        mlp_width=160,
        num_heads=6,
        num_kv_heads=2,
        head_width=16,
        vocab_size=VOCAB_SIZE,
      )
    ),
    drafter=DraftConfig(
      num_layers=2, block_size=4, num_taps=2, mask_token_id=MASK_TOKEN_ID
    ),
    decode=DecodeConfig(max_new_tokens=32, max_length=512),
    synthesis=SynthesisConfig(
      output="corpus/tiny",
      num_self_prompts=192,
      prompt_tokens=64,
      answer_temperature=1.0,
      max_answer_tokens=48,
      batch_size=16,
      shard_sequences=48,
      held_out=0.1,
    ),
    train=TrainConfig(
      corpus=("corpus/tiny",),
      steps=40,
      sequence_length=128,
      num_anchors=8,
      log_every=10,
      evaluate_every=20,
      checkpoint_every=20,
      evaluate_sequences=4,
    ),
    eval=EvalConfig(limit=4, max_new_tokens=32),
  )
