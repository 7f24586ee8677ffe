r"""The variants of the ablation, trained for longer, on one GPU.

    python -m train.ablate --config=configs/ablation_gpu.py --jobs=2

The drafters that configs/ablation.py trains for 320 steps of 2 sequences, here
for 900 steps of 32, with the corpus of configs/smollm2_135m_gpu.py and
features computed online. Same parts, same budgets of parameters, one seed. Runs
that share a GPU take turns, and seconds per step are those of a crowd. What is
trained can be judged on another machine, by the same command with
--skip_training. docs/results/ablation_gpu.md is what came out.
"""

import dataclasses
import pathlib

from configs import ablation
from dflash_jax import config_file
from dflash_jax.config import AblationConfig, Config

BASE = pathlib.Path(__file__).parent / "smollm2_135m_gpu.py"
STEPS = 900
ARMS = ("dflash", "lm", "eagle3", "dflash2", "dspark", "domino", "dspark_own")
UNTRAINED = ("ngram",)


def get_config() -> Config:
  """900 steps of 32 sequences x 64 anchors, one seed, greedy and sampled."""
  base = config_file.read(BASE)
  grid = ablation.get_config()
  known = {*ARMS, *UNTRAINED}
  return dataclasses.replace(
    base,
    name="ablation_gpu",
    drafter=grid.drafter,
    decode=grid.decode,
    train=dataclasses.replace(
      base.train,
      steps=STEPS,
      batch_size=32,
      loss=grid.train.loss,
      optimizer=grid.train.optimizer,
      log_every=50,
      evaluate_every=STEPS // 4,
      checkpoint_every=STEPS // 4,
      keep_checkpoints=1,
    ),
    eval=grid.eval,
    ablation=AblationConfig(
      arms=tuple(
        arm for arm in ablation.ARMS if arm.partition(":")[0] in known
      ),
      prompts=grid.ablation.prompts,
      compare=tuple(
        pair
        for pair in ablation.COMPARE
        if {*pair.partition(":")[0].split(" vs ")} <= known
      ),
    ),
  )
