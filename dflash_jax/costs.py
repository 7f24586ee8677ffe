"""What a round costs on this device, by verify width."""

import dataclasses
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.decode import Decoder
from dflash_jax.decode_state import DecodeState, ModelParams
from dflash_jax.width import BURST, Costs

PASSES = 5  # timed dispatches of each width; the median counts
ENDLESS = 1 << 30  # a budget that no dispatch reaches


def measure_costs(
  decoder: Decoder,
  params: ModelParams,
  new_state: Callable[[], DecodeState],
) -> Costs:
  """Times the very program that will decode, forced to each width in turn.

  Args:
    decoder: whose policy asks for costs.
    params: of the model; their costs are not looked at.
    new_state: makes a state of the shapes that will be decoded.

  Returns:
    Seconds of a plain pass, and of a round at each compiled width.
  """
  policy = decoder.policy
  widths = policy.widths(decoder.drafting.num_nodes)
  unknown = Costs(
    plain=jnp.ones(()), rounds=jnp.ones((len(widths),), jnp.float32)
  )
  params = dataclasses.replace(params, costs=unknown)

  def run(index: int) -> float:
    """Seconds of a round at one width; index len(widths): of a plain pass."""
    state = new_state()
    state = decoder.begin(
      state, jnp.full_like(state.budget, ENDLESS), state.seeds
    )
    cache = state.cache
    half = jnp.full_like(cache.length, cache.capacity // 2)
    state = dataclasses.replace(
      state,
      cache=dataclasses.replace(cache, length=half),
      width=policy.force(state.width, index),
    )
    is_plain = index == len(widths)
    dispatch = decoder.run_plain if is_plain else decoder.run_rounds
    passes = BURST if is_plain else decoder.rounds_per_dispatch
    state = jax.block_until_ready(state)
    start = time.perf_counter()
    jax.block_until_ready(dispatch(params, state))
    return (time.perf_counter() - start) / passes

  run(0), run(len(widths))  # compile
  order = [*range(len(widths) + 1)] * PASSES  # slow moments hit all alike
  seconds = np.array([run(index) for index in order])
  medians = np.median(seconds.reshape(PASSES, -1), axis=0)
  return Costs(
    plain=jnp.float32(medians[-1]),
    rounds=jnp.asarray(medians[:-1], jnp.float32),
  )
