"""Block-diffusion speculative decoding: train, evaluate, decode.

    import dflash_jax
    model = dflash_jax.load("configs/smollm2_135m.py")
    print(dflash_jax.generate(model, "Why is the sky blue?").text)

Letters, in shapes and einsums everywhere:

    B batch                      L layers
    T tokens in a chunk          D model width
    S cache slots                F mlp width
    K block size, with anchor    N query heads
    A anchors per sequence       G key/value heads
    P proposal nodes             H head width
    R rounds per dispatch        V vocabulary

Words, one per thing: the target verifies what the drafter proposes. A block
starts with the anchor, the last committed token, and goes on with mask tokens.
Taps are target layers whose output makes the drafter's context features. A
round is one proposal, its verdict and its commit. tau is the accepted length:
tokens emitted per target pass, bonus token included.
"""

# ruff: noqa: E402

import os

# transformers is here for its tokenizers; it need not say that torch is not.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from dflash_jax import config_file
from dflash_jax import model as _model
from dflash_jax.config import Config
from dflash_jax.generate import generate
from dflash_jax.model import Model
from dflash_jax.session import Completion

__all__ = ["Completion", "Config", "Model", "generate", "load"]


def load(config: Config | str | os.PathLike[str]) -> Model:
  """Loads the target, drafter and tokenizer that a Config, or its file, names.

  Raises:
    ConfigError: an unknown file, or a drafter that does not fit the target.
    weights.WeightsError: a missing or damaged checkpoint.
  """
  if not isinstance(config, Config):
    config = config_file.read(config)
  return _model.load(config)
