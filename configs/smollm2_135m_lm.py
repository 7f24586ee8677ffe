r"""A small language model that drafts for SmolLM2-135M-Instruct, distilled.

    python -m train.main --config=configs/smollm2_135m_lm.py \
        --workdir=runs/lm

As configs/smollm2_135m_cpu.py, on the same corpus and features, with 12.3
million parameters of its own (12.3 there); docs/drafters.md says what it is.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import Config

BASE = pathlib.Path(__file__).parent / "smollm2_135m_cpu.py"


def get_config() -> Config:
  """Three layers between the target's own embedding and head."""
  base = config_file.read(BASE)
  return dataclasses.replace(
    base,
    name="smollm2_135m_lm",
    drafter=dataclasses.replace(
      base.drafter,
      name="lm",
      mlp_width=1856,
      draft_vocabulary=0,
    ),
    train=dataclasses.replace(
      base.train,
      loss="ce + kl",
      slot_weights="uniform",
    ),
  )
