r"""EAGLE-3 for SmolLM2-135M-Instruct: one layer that feeds on itself.

    python -m train.main --config=configs/smollm2_135m_eagle3.py \
        --workdir=runs/eagle3

As configs/smollm2_135m_cpu.py, on the same corpus and features, with 12.2
million parameters of its own (12.3 there); docs/drafters.md says what it is.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import Config

BASE = pathlib.Path(__file__).parent / "smollm2_135m_cpu.py"


def get_config() -> Config:
  """A wide MLP; three of the taps that the others read, too."""
  base = config_file.read(BASE)
  return dataclasses.replace(
    base,
    name="smollm2_135m_eagle3",
    drafter=dataclasses.replace(
      base.drafter,
      name="eagle3",
      num_layers=1,
      mlp_width=2944,
      taps=(1, 14, 27),
    ),
    train=dataclasses.replace(
      base.train,
      loss="kl",
      slot_weights="decay",
    ),
  )
