"""Gradients to updates: clipping, AdamW or Muon, schedules, averaged weights.

Muon orthogonalises the update of a matrix that maps states to states (Jordan
2024, as optax has it; update RMS matched to Adam's, arXiv 2502.16982). Norms,
biases and the convolution's base kernel are no such matrices. Tables with a row
or column per token are neither, since most rows see no gradient in a step: they
move under AdamW, and at the full rate (at a tenth of it DSpark's Markov head
hardly left zero in ten epochs; speculators, pull request 1066).
"""

import jax
import optax

from dflash_jax.config import ConfigError, TrainConfig
from dflash_jax.target import Params

MATCHED_RMS = 0.2  # of Muon's updates, about Adam's
# Parts of a path that name tables by token.
TABLES = frozenset(
  ("predecessors", "successors", "before", "after", "widen")
  + ("embedding", "head")
)


def route(params: Params) -> Params:
  """For each leaf, what it is: "matrix", "table" or "vector"."""

  def kind(path, leaf) -> str:
    names = {str(getattr(key, "key", "")) for key in path}
    if names & TABLES:
      return "table" if leaf.ndim > 1 else "vector"
    return "matrix" if leaf.ndim == 2 and min(leaf.shape) > 1 else "vector"

  return jax.tree_util.tree_map_with_path(kind, params)


def make_schedule(config: TrainConfig) -> optax.Schedule:
  """Linear warm-up to the peak, then as config.schedule says.

  Raises:
    ConfigError: for an unknown schedule.
  """
  warmup = max(1, round(config.warmup * config.steps))
  steps = max(warmup + 1, config.steps)
  peak = config.learning_rate
  if config.schedule == "cosine":
    after = optax.cosine_decay_schedule(
      peak, steps - warmup, config.final_learning_rate
    )
  elif config.schedule == "linear":
    end = peak * config.final_learning_rate
    after = optax.linear_schedule(peak, end, steps - warmup)
  elif config.schedule == "constant":
    after = optax.constant_schedule(peak)
  else:
    raise ConfigError(
      f"train.schedule={config.schedule!r} is unknown; choose 'cosine', "
      "'linear' or 'constant'"
    )
  rise = optax.linear_schedule(0.0, peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """The run's optimiser, after clipping by global norm.

  Raises:
    ConfigError: for an unknown optimiser or schedule.
  """
  schedule = make_schedule(config)

  def adamw(share: float, weight_decay: float) -> optax.GradientTransformation:
    return optax.adamw(
      lambda step: share * schedule(step),
      b1=config.beta1,
      b2=config.beta2,
      weight_decay=weight_decay,
    )

  rules = {"table": adamw(1.0, config.weight_decay)}
  if config.optimizer == "adamw":
    rules["matrix"] = adamw(1.0, config.weight_decay)
    rules["vector"] = adamw(1.0, 0.0)
  elif config.optimizer == "muon":
    rules["vector"] = adamw(config.vector_rate, 0.0)
    rules["matrix"] = optax.contrib.muon(
      schedule,
      beta=config.momentum,
      weight_decay=config.weight_decay,
      consistent_rms=MATCHED_RMS,
    )
  else:
    raise ConfigError(
      f"train.optimizer={config.optimizer!r} is unknown; choose 'adamw' or "
      "'muon'"
    )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm), optax.partition(rules, route)
  )
