"""Checks of a TrainConfig that its types cannot make."""

from dflash_jax.config import ConfigError, TrainConfig

_AT_LEAST = {
  "steps": 1,
  "batch_size": 1,
  "sequence_length": 2,
  "num_anchors": 1,
  "decay": 0,
  "learning_rate": 0,
  "weight_decay": 0,
  "clip_norm": 0,
  "loss_chunk": 1,
  "log_every": 1,
  "evaluate_every": 1,
  "checkpoint_every": 1,
  "evaluate_sequences": 1,
  "keep_checkpoints": 1,
  "seed": 0,
}
_AT_MOST_ONE = ("dpace_alpha", "teacher_share", "final_learning_rate")
_BELOW_ONE = ("warmup", "beta1", "beta2")
_CHOICES = {"loss": ("ce", "dpace"), "compute_dtype": ("float32", "bfloat16")}


def check_settings(config: TrainConfig) -> None:
  """Raises ConfigError for a value nobody could train with."""
  for name, least in _AT_LEAST.items():
    if not (value := getattr(config, name)) >= least:
      raise _impossible(name, value, f"use at least {least}")
  for name in _AT_MOST_ONE:
    if not 0 <= (value := getattr(config, name)) <= 1:
      raise _impossible(name, value, "use 0 to 1")
  for name in _BELOW_ONE:
    if not 0 <= (value := getattr(config, name)) < 1:
      raise _impossible(name, value, "use at least 0 and less than 1")
  for name, choices in _CHOICES.items():
    if (value := getattr(config, name)) not in choices:
      known = " or ".join(map(repr, choices))
      raise _impossible(name, repr(value), f"choose {known}")


def _impossible(name: str, value: object, remedy: str) -> ConfigError:
  return ConfigError(f"train.{name}={value} is impossible; {remedy}")
