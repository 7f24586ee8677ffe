r"""The default drafter among its variants and the baselines of the field.

    python -m eval.suite --config=configs/suite_variants.py --ladder \
      --output=docs/results/suite --report=docs/results/suite.html \
      --markdown=docs/results/suite.md

configs/suite.py with more to compare: plain decoding, n-gram look-up, a small
LM, EAGLE-3, DFlash, DSpark and Domino as configs/variants.py trains them, and
the default DFlash 2, which was trained for far longer. On two free CPU cores
that takes about an hour. docs/results/suite.md is what came out.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import Config

BASE = pathlib.Path(__file__).parent / "suite.py"


def get_config() -> Config:
  """Seven drafters on the same prompts, in turns."""
  base = config_file.read(BASE)
  ngram, default = base.suite.drafters
  trained = (
    f"{name}: runs/variants/{name}/seed0/drafter"
    for name in ("lm", "eagle3", "dflash", "dspark", "domino")
  )
  return dataclasses.replace(
    base,
    name="suite_variants",
    suite=dataclasses.replace(base.suite, drafters=(ngram, *trained, default)),
  )
