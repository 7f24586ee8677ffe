r"""The default target's drafters, side by side on three local prompt sets.

    python -m eval.suite --config=configs/suite.py --output=runs/suite \
      --report=runs/suite.html

Plain decoding, n-gram look-up and the default drafter, at temperatures 0 and
1: 8 prompts a set, up to 128 tokens a reply. On two free CPU cores that
takes some 20 minutes (estimated), half of them to compile; what is there is not
measured again. More drafters, each a line "NAME: PATH field=value ...":

    --config.suite.drafters='("ngram: ngram", "eagle3: runs/eagle3/drafter")'

docs/protocol.md says what is measured, and how.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import Config, EvalConfig, SuiteConfig

BASE = pathlib.Path(__file__).parent / "smollm2_135m.py"
PROMPTS = pathlib.Path(__file__).parents[1] / "eval" / "prompts"


def get_config() -> Config:
  """Two drafters; chat, code, and instructions of all kinds."""
  base = config_file.read(BASE)
  return dataclasses.replace(
    base,
    name="suite",
    eval=EvalConfig(limit=8, max_new_tokens=128),
    suite=SuiteConfig(
      drafters=("ngram: ngram", f"dflash2: '{base.drafter.path}'"),
      prompts=tuple(
        str(PROMPTS / f"{name}.jsonl") for name in ("chat", "code", "mixed")
      ),
    ),
  )
