"""The flags that decoding commands share, each short for a config field."""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import flags

from dflash_jax.config import Config, DecodeConfig

_HELP = {
  "rule": "Rule of verification: greedy, coupled, token, block, or typical "
  "(lossy). Default: greedy at temperature 0, coupled above.",
  "temperature": "Of the target; 0 is greedy.",
  "top_k": "Sample only the k likeliest tokens; 0 for all.",
  "top_p": "Sample only the likeliest tokens that hold this share of the "
  "probability.",
  "min_p": "Sample only tokens at least this much as likely as the likeliest.",
  "draft_temperature": "Of the drafter; 0 drafts the likeliest tokens. Changes "
  "speed, never the law of the text.",
  "draft_top_k": "Draft only the k likeliest tokens; 0 for all.",
  "block_size": "Slots per block, at most what the drafter was trained for; 0 "
  "for that.",
  "tree_nodes": "Nodes of candidate trees; 0 drafts chains.",
  "width": "Nodes verified per round: fixed:N, threshold:T or goodput. "
  "Default: the device's.",
  "seed": "Of everything sampled.",
}


def define_flags() -> None:
  """Defines a flag for each field in _HELP."""
  kinds: dict[type, Callable[..., Any]] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  defaults = DecodeConfig()
  for name, text in _HELP.items():
    define = kinds[type(getattr(defaults, name))]
    end = "" if "Default" in text else f" Default: config.decode.{name}."
    define(name, None, text + end)


def override(config: Config, **given: Any) -> Config:
  """The config, with the fields that flags or `given` name replaced.

  Args:
    config: of the run.
    **given: further fields of its decode section.
  """
  values = flags.FLAGS
  for name in _HELP:
    if getattr(values, name) is not None:
      given[name] = getattr(values, name)
  return dataclasses.replace(
    config, decode=dataclasses.replace(config.decode, **given)
  )
