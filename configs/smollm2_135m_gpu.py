r"""The default drafter of SmolLM2-135M-Instruct, trained in minutes of one GPU.

    tools/gpu_run.sh --config=configs/smollm2_135m_gpu.py

docs/gpu.md explains the command. The default drafter is made by it, and
docs/default_drafter.md says with which flags. Its parts, by hand:

    python -m train.synthesize --config=configs/smollm2_135m_gpu.py \
        --config.synthesis.prompts='("questions.jsonl",)'
    python -m train.main --config=configs/smollm2_135m_gpu.py --workdir=runs/gpu

The drafter's shape is that of configs/smollm2_135m_dflash2.py: 12.7 million
parameters, 28 MB in bfloat16 in the published layout. Batches are 32 times as
large as a CPU's, features are computed online, and matrices learn under Muon,
which costs a GPU next to nothing.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import Config

BASE = pathlib.Path(__file__).parent / "smollm2_135m_dflash2.py"


def get_config() -> Config:
  """DFlash 2 under Muon; 24,576 prompts of the target's own, a quarter code."""
  base = config_file.read(BASE)
  return dataclasses.replace(
    base,
    name="smollm2_135m_gpu",
    target=dataclasses.replace(base.target, dtype="bfloat16"),
    synthesis=dataclasses.replace(
      base.synthesis,
      output="corpus/smollm2_135m_gpu",
      num_self_prompts=24 * 1024,
      openings=("", "", "", "", "How", "What", "Write", "Can you", "Explain")
      + ("Write a Python function", "Write a program", "Implement a function")
      + ("Write a Python script", "Write code")
      + ("Solve", "Calculate", "Give me", "I", "Why", "Summarize"),
      batch_size=1024,
      shard_sequences=2048,
    ),
    train=dataclasses.replace(
      base.train,
      corpus=("corpus/smollm2_135m_gpu",),
      feature_cache="",
      steps=4000,
      batch_size=64,
      sequence_length=320,
      num_anchors=64,
      optimizer="muon",
      learning_rate=3e-3,
      loss_chunk=1024,
      evaluate_every=1000,
      checkpoint_every=1000,
      evaluate_sequences=128,
    ),
    eval=dataclasses.replace(base.eval, limit=40),
  )
