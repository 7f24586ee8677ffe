r"""DSpark for SmolLM2-135M-Instruct: a Markov head and a confidence head.

    python -m train.main --config=configs/smollm2_135m_dspark.py \
        --workdir=runs/dspark

As configs/smollm2_135m_cpu.py, on the same corpus and features, with 12.1
million parameters of its own (12.3 there); docs/drafters.md says what it is.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import Config

BASE = pathlib.Path(__file__).parent / "smollm2_135m_cpu.py"


def get_config() -> Config:
  """Seven slots, all of which draft; the published loss, |p - q| as 2 TV."""
  base = config_file.read(BASE)
  return dataclasses.replace(
    base,
    name="smollm2_135m_dspark",
    drafter=dataclasses.replace(
      base.drafter,
      name="dspark",
      block_size=7,
      mlp_width=1152,
      markov_rank=32,
    ),
    train=dataclasses.replace(
      base.train,
      loss="0.1*ce + 1.8*tv + confidence",
      slot_weights="decay",
    ),
  )
