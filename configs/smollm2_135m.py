"""SmolLM2-135M-Instruct with the drafter shipped in checkpoints/.

    python -m dflash_jax --config=configs/smollm2_135m.py --prompt "Hello!"

README.md has the speed and accepted length to expect.
"""

from dflash_jax.config import (
  SMOLLM2_PACKAGE,
  Config,
  DecodeConfig,
  DraftConfig,
  TargetSource,
)


def get_config() -> Config:
  """The default run."""
  return Config(
    name="smollm2_135m",
    target=TargetSource(path=SMOLLM2_PACKAGE),
    drafter=DraftConfig(path="none", mask_token_id=16),
    decode=DecodeConfig(),
  )
