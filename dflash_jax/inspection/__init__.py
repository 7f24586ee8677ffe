"""What a checkpoint is, which target it fits, and all that is wrong with it."""

from dflash_jax.inspection.checkpoint import inspect
from dflash_jax.inspection.report import Report

__all__ = ["Report", "inspect"]
