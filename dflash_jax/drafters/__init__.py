"""Drafters. Each obeys base.Drafter, and one decode loop runs them all."""

from dflash_jax.drafters.base import Borrowed, Drafter
from dflash_jax.drafters.dflash import DFlash
from dflash_jax.drafters.eagle3 import Eagle3
from dflash_jax.drafters.lm import LanguageModel
from dflash_jax.drafters.ngram import NGram
from dflash_jax.drafters.nothing import NoDrafter

__all__ = [
  "Borrowed",
  "DFlash",
  "Drafter",
  "Eagle3",
  "LanguageModel",
  "NGram",
  "NoDrafter",
]
