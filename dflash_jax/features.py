"""Which layers of the target a drafter reads, and how many."""

from dflash_jax.config import ConfigError


def choose_taps(num_target_layers: int, num_taps: int) -> tuple[int, ...]:
  """Published rule: evenly from layer 1 to the third from the end.

  round(1 + i (n - 4) / (taps - 1)) for i = 0..taps-1, ids 0-based, each naming
  the layer whose *output* is read; a single tap is the middle layer. Qwen3-8B
  (n = 36, 5 taps): 1, 9, 17, 25, 33. Source: DFlash release, model.py.

  Raises:
    ConfigError: if the target is too shallow for that many distinct taps.
  """
  if num_taps == 1:
    return (num_target_layers // 2,)
  span = num_target_layers - 4
  if span < num_taps - 1:
    raise ConfigError(
      f"num_taps={num_taps} distinct taps do not fit a target of "
      f"{num_target_layers} layers; use at most {max(span + 1, 1)}, or name "
      "them in drafter.taps"
    )
  return tuple(round(1 + i * span / (num_taps - 1)) for i in range(num_taps))
