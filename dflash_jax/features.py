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


def choose_eagle3_taps(num_target_layers: int) -> tuple[int, ...]:
  """Low, middle and high: what enters layers 2, n // 2 and n - 3.

  Ids are 0-based and name the layer whose *output* is read, one less than the
  layer it enters, by which published configs name it.
  Source: EAGLE-3's released model; vLLM's default (vllm-project/vllm #16937).

  Raises:
    ConfigError: if the target is too shallow for three distinct taps.
  """
  n = num_target_layers
  if n < 7:
    raise ConfigError(
      f"a target of {n} layers is too shallow for the published taps, which "
      "need 7; name them, as eagle_config.eagle_aux_hidden_state_layer_ids "
      "in a checkpoint"
    )
  return (1, n // 2 - 1, n - 4)
