"""lm_head_verify: kernels against the reference, and the reference itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lm_head_verify import api, reference
from pallas_kernels.lm_head_verify.row_stats import Draws
from tests.pallas_kernels.interpreter import RACE, SOUND, Job, Mutant, run

CHECK = "tests.pallas_kernels.checks:lm_head_verify"
KERNELS = ("sm90", "sm100")
# rows, width, vocabulary and more: fewer tiles than CTAs, one step, one row,
# last tiles cut short, more rows than a tile, every epilogue.
SHAPES = (
  dict(rows=1, width=64, vocabulary=97),
  dict(rows=1, width=200, vocabulary=1031, cores=2, draws=True),
  dict(rows=13, width=136, vocabulary=1304, vocab_axis=1, draws=True),
  dict(rows=31, width=128, vocabulary=640, softcap=9.0),
  dict(rows=37, width=192, vocabulary=1031, cores=2, draws=True),
  dict(rows=67, width=64, vocabulary=1304, vocab_axis=1, softcap=20.0),
  dict(rows=128, width=328, vocabulary=769, cores=1),
  dict(rows=131, width=64, vocabulary=1100, cores=5, draws=True),
)
