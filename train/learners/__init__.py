"""Learners. Each obeys base.Learner, and one trainer runs them all."""

from typing import Any

from dflash_jax.config import TrainConfig
from dflash_jax.drafters import DFlash, Eagle3, LanguageModel
from dflash_jax.target import Target
from train.learners.base import Learner
from train.learners.blocks import BlockLearner
from train.learners.eagle3 import Eagle3Learner
from train.learners.lm import LmLearner

_BY_DRAFTER: dict[type, type[Learner]] = {
  DFlash: BlockLearner,
  Eagle3: Eagle3Learner,
  LanguageModel: LmLearner,
}

__all__ = ["Learner", "make_learner"]


def make_learner(target: Target, drafter: Any, config: TrainConfig) -> Learner:
  """How this drafter learns.

  Raises:
    ConfigError: for a loss that is none, or does not fit the drafter.
  """
  return _BY_DRAFTER[type(drafter)].create(target, drafter, config)
