r"""A drafter for SmolLM2-135M-Instruct, scaled to what a 2-core CPU can train.

    python -m train.synthesize --config=configs/smollm2_135m_cpu.py \
        --config.synthesis.prompts='("questions.jsonl",)'
    python -m train.main --config=configs/smollm2_135m_cpu.py --workdir=runs/cpu

docs/default_drafter.md has what to expect, measured.
"""

from dflash_jax.config import (
  SMOLLM2_PACKAGE,
  Config,
  DraftConfig,
  SynthesisConfig,
  TargetSource,
  TrainConfig,
)


def get_config() -> Config:
  """Few, short sequences; three layers; features cached on disk."""
  return Config(
    name="smollm2_135m_cpu",
    target=TargetSource(path=SMOLLM2_PACKAGE),
    drafter=DraftConfig(
      num_layers=3,
      block_size=8,
      num_taps=5,
      mask_token_id=16,
      draft_vocabulary=8192,
    ),
    synthesis=SynthesisConfig(
      output="corpus/smollm2_135m_cpu",
      num_self_prompts=3584,
      openings=("", "", "", "How", "What", "Write", "Can you", "Explain")
      + ("Write a Python function", "Solve", "Give me", "I"),
      max_answer_tokens=192,
      batch_size=128,
      shard_sequences=512,
    ),
    train=TrainConfig(
      corpus=("corpus/smollm2_135m_cpu",),
      feature_cache="corpus/smollm2_135m_cpu/features",
      sequence_length=288,
      batch_size=2,
      num_anchors=32,
      steps=14_000,
      loss_chunk=256,
      learning_rate=2.5e-3,
      loss="0.5*ce + 0.5*kl",
      log_every=100,
      evaluate_every=2000,
      checkpoint_every=2000,
      evaluate_sequences=96,
    ),
  )
