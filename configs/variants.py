r"""Variants of one size, trained on two CPU cores, for configs/suite.py.

    python -m train.synthesize --config=configs/smollm2_135m_cpu.py \
      --config.synthesis.output=corpus/small \
      --config.synthesis.num_self_prompts=896 \
      --config.synthesis.num_file_prompts=256 \
      --config.synthesis.prompts='("gsm8k_train.jsonl",)'
    python -m train.ablate --config=configs/variants.py --jobs=2 \
      --report=runs/variants.md

Arms of configs/ablation.py, with its parts and budgets of parameters: DFlash,
DSpark, Domino, EAGLE-3 and a small LM, for twice its steps and one seed, on
some 1,000 answers. What they learn in that time is little: they are there to be
set side by side, not to be used.
"""

import dataclasses
import pathlib

from configs import ablation
from dflash_jax.config import Config

CORPUS = pathlib.Path("corpus/small")
STEPS = 640
ARMS = ("dflash", "dspark", "domino", "eagle3", "lm")


def get_config() -> Config:
  """640 steps of 2 sequences x 32 anchors; nothing decoded but by the suite."""
  base = ablation.get_config()
  return dataclasses.replace(
    base,
    name="variants",
    train=dataclasses.replace(
      base.train,
      corpus=(str(CORPUS),),
      feature_cache=str(CORPUS / "features"),
      steps=STEPS,
      evaluate_every=STEPS,
      checkpoint_every=STEPS,
    ),
    ablation=dataclasses.replace(
      base.ablation,
      arms=tuple(
        arm for arm in base.ablation.arms if arm.partition(":")[0] in ARMS
      ),
      seeds=(0,),
      compare=(),
    ),
  )
