"""SmolLM2-135M-Instruct with the drafter shipped in checkpoints/.

    python -m dflash_jax --config=configs/smollm2_135m.py --prompt "Hello!"

docs/default_drafter.md has the speed and accepted length to expect.
"""

import pathlib

from dflash_jax.config import (
  SMOLLM2_PACKAGE,
  Config,
  DraftConfig,
  TargetSource,
)

DRAFTER = pathlib.Path(__file__).parents[1] / "checkpoints" / "smollm2_135m"


def get_config() -> Config:
  """The default run."""
  return Config(
    name="smollm2_135m",
    target=TargetSource(path=SMOLLM2_PACKAGE),
    drafter=DraftConfig(path=str(DRAFTER)),
  )
