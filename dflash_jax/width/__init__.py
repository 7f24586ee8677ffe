"""How many nodes of a draft the target verifies: policies by name."""

from dflash_jax.config import ConfigError
from dflash_jax.width.base import (
  BURST,
  UNMEASURED,
  Costs,
  Fixed,
  Outcome,
  Policy,
)
from dflash_jax.width.goodput import Goodput
from dflash_jax.width.threshold import Threshold

__all__ = [
  "BURST",
  "UNMEASURED",
  "Costs",
  "Fixed",
  "Goodput",
  "Outcome",
  "Policy",
  "Threshold",
  "parse_width",
]


def parse_width(text: str) -> Policy:
  """Reads "fixed:8", "threshold:0.4" or "goodput"; else raises ConfigError."""
  kind, _, value = text.partition(":")
  try:
    if kind == "fixed" and value.isascii() and value.isdecimal():
      return Fixed(int(value))
    if kind == "threshold" and 0 < float(value) < 1:
      return Threshold(float(value))
  except ValueError:
    pass
  if text == "goodput":
    return Goodput()
  raise ConfigError(
    f"width {text!r} is unknown; use fixed:N with a whole N >= 0, threshold:T "
    "with 0 < T < 1, or goodput"
  )
