"""Checks of a TrainConfig that its types cannot make."""

import math

from dflash_jax.config import ConfigError, TrainConfig
from train.objective import SELECTOR_MISSES, SLOT_WEIGHTS, Objective

_AT_LEAST = {
  "steps": 1,
  "batch_size": 1,
  "sequence_length": 2,
  "packing": 0,
  "accumulate": 1,
  "data": 0,
  "fsdp": 1,
  "num_anchors": 1,
  "decay": 0,
  "learning_rate": 0,
  "weight_decay": 0,
  "clip_norm": 0,
  "unroll_steps": 1,
  "anchor_chunk": 0,
  "loss_chunk": 1,
  "log_every": 1,
  "evaluate_every": 1,
  "checkpoint_every": 1,
  "evaluate_sequences": 1,
  "keep_checkpoints": 1,
  "decode_every": 0,
  "decode_prompts": 1,
  "decode_tokens": 1,
  "seed": 0,
}
_AT_MOST_ONE = (
  "dpace_alpha",
  "curriculum",
  "final_learning_rate",
  "vector_rate",
)
_BELOW_ONE = ("warmup", "beta1", "beta2", "momentum", "ema")
_CHOICES = {
  "slot_weights": SLOT_WEIGHTS,
  "selector_misses": SELECTOR_MISSES,
  "optimizer": ("adamw", "muon"),
  "schedule": ("cosine", "linear", "constant"),
  "compute_dtype": ("float32", "bfloat16"),
}


def check_settings(config: TrainConfig) -> None:
  """Raises ConfigError for a value nobody could train with."""
  for name, least in _AT_LEAST.items():
    value = getattr(config, name)
    if not least <= value < math.inf:
      raise _impossible(name, value, f"use at least {least}")
  for name in _AT_MOST_ONE:
    if not 0 <= (value := getattr(config, name)) <= 1:
      raise _impossible(name, value, "use 0 to 1")
  for name in _BELOW_ONE:
    if not 0 <= (value := getattr(config, name)) < 1:
      raise _impossible(name, value, "use at least 0 and less than 1")
  for name, choices in _CHOICES.items():
    if (value := getattr(config, name)) not in choices:
      *others, last = map(repr, choices)
      known = f"{', '.join(others)} or {last}"
      raise _impossible(name, repr(value), f"choose {known}")
  if config.batch_size % config.accumulate:
    raise _impossible(
      "accumulate",
      config.accumulate,
      f"it must divide train.batch_size={config.batch_size}",
    )
  if config.hybrid_features and not config.feature_cache:
    raise _impossible(
      "hybrid_features",
      True,
      "name a directory in train.feature_cache, or train with online features",
    )
  Objective.of(config)


def _impossible(name: str, value: object, remedy: str) -> ConfigError:
  return ConfigError(f"train.{name}={value} is impossible; {remedy}")
