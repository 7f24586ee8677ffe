"""Drafters by name. Each obeys base.Drafter; one decode loop runs them all."""

from dflash_jax.drafters.base import Borrowed, Drafter
from dflash_jax.drafters.dflash import DFlash
from dflash_jax.drafters.nothing import NoDrafter

REGISTRY = {"dflash": DFlash, "none": NoDrafter}

__all__ = ["REGISTRY", "Borrowed", "DFlash", "Drafter", "NoDrafter"]
