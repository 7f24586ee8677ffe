r"""A drafter for SmolLM2-135M-Instruct, scaled to half an hour of one GPU.

    tools/gpu_run.sh --config=configs/smollm2_135m_gpu.py

docs/gpu.md explains the command. Its parts, by hand:

    python -m train.synthesize --config=configs/smollm2_135m_gpu.py \
        --config.synthesis.prompts='("questions.jsonl",)'
    python -m train.main --config=configs/smollm2_135m_gpu.py --workdir=runs/gpu

What to expect of one 80 GB data-center GPU, estimated and not yet measured: a
decode step of 1024 rows takes 8 to 15 ms, most of it the cache, and rows that
end early wait for the longest; so 30,000 to 60,000 kept tokens a second, 10 to
20 million in the five to eight minutes that answering takes. 100 million would
take most of an hour. A training step (64 sequences, 4096 blocks) takes 60 to
100 ms: 6,000 to 10,000 steps in ten minutes, each sequence seen five to ten
times. The aim is a decoded tau of 3.5 on held-out GSM8K questions and 2.5 on
the target's own prompts.

The drafter's shape is that of the one shipped in checkpoints/: 12.4 million
parameters, 25 MB in bfloat16.
"""

from dflash_jax.config import (
  SMOLLM2_PACKAGE,
  Config,
  DecodeConfig,
  DraftConfig,
  EvalConfig,
  SynthesisConfig,
  TargetSource,
  TrainConfig,
)

MAX_PROMPT_TOKENS = 192
MAX_ANSWER_TOKENS = 256


def get_config() -> Config:
  """Three layers, block 10; large batches; features computed online."""
  return Config(
    name="smollm2_135m_gpu",
    target=TargetSource(path=SMOLLM2_PACKAGE, dtype="bfloat16"),
    drafter=DraftConfig(
      num_layers=3,
      block_size=10,
      num_taps=5,
      mask_token_id=16,
      draft_vocabulary=16384,
    ),
    decode=DecodeConfig(),
    synthesis=SynthesisConfig(
      output="corpus/smollm2_135m_gpu",
      num_self_prompts=96 * 1024,
      openings=("", "", "", "", "How", "What", "Write", "Can you", "Explain")
      + ("Write a Python function", "Write code", "Solve", "Calculate")
      + ("Give me", "I", "Why", "Summarize", "A"),
      max_prompt_tokens=MAX_PROMPT_TOKENS,
      max_answer_tokens=MAX_ANSWER_TOKENS,
      batch_size=1024,
      shard_sequences=2048,
      held_out=0.02,
    ),
    train=TrainConfig(
      corpus=("corpus/smollm2_135m_gpu",),
      steps=8000,
      batch_size=64,
      sequence_length=MAX_PROMPT_TOKENS + MAX_ANSWER_TOKENS,
      num_anchors=64,
      learning_rate=1e-3,
      loss_chunk=1024,
      evaluate_sequences=128,
    ),
    eval=EvalConfig(limit=40, max_new_tokens=128),
  )
