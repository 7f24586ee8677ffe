r"""Domino for SmolLM2-135M-Instruct: a GRU corrects the slots.

    python -m train.main --config=configs/smollm2_135m_domino.py \
        --workdir=runs/domino

As configs/smollm2_135m_cpu.py, on the same corpus and features, with 12.5
million parameters of its own (12.3 there); docs/drafters.md says what it is.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import Config

BASE = pathlib.Path(__file__).parent / "smollm2_135m_cpu.py"


def get_config() -> Config:
  """Seven slots, all of which draft; the published curriculum."""
  base = config_file.read(BASE)
  return dataclasses.replace(
    base,
    name="smollm2_135m_domino",
    drafter=dataclasses.replace(
      base.drafter,
      name="domino",
      block_size=7,
      mlp_width=1408,
      gru_width=144,
      gru_rank=64,
    ),
    train=dataclasses.replace(
      base.train,
      loss="ce",
      curriculum=1.0,
    ),
  )
