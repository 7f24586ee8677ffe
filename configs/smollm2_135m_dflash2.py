r"""DFlash 2 for SmolLM2-135M-Instruct: convolutions and a path selector.

    python -m train.main --config=configs/smollm2_135m_dflash2.py \
        --workdir=runs/dflash2

As configs/smollm2_135m_cpu.py, on the same corpus and features, with 12.7
million parameters of its own (12.3 there); docs/drafters.md says what it is.
The default drafter was made by it until a GPU was at hand, and has its shape:
configs/smollm2_135m_gpu.py.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import Config

BASE = pathlib.Path(__file__).parent / "smollm2_135m_cpu.py"


def get_config() -> Config:
  """Parts of the published sizes, scaled to this width; the MLP pays."""
  base = config_file.read(BASE)
  return dataclasses.replace(
    base,
    name="smollm2_135m_dflash2",
    drafter=dataclasses.replace(
      base.drafter,
      name="dflash2",
      mlp_width=1152,
      selector_rank=32,
    ),
    train=dataclasses.replace(
      base.train,
      loss="0.5*ce + 0.5*kl + selector",
    ),
  )
