"""What a round costs: the loop against its own drafter and target calls.

    .venv/bin/python tools/bench_round.py

Times, for each verify width, a round inside the jitted loop, and the same
drafter and target calls jitted one by one with donated caches; prints medians
over interleaved repeats. The loop's share on top is its verdict, commit and
bookkeeping, less what it saves in dispatches.
"""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.config_file import default_path, read
from dflash_jax.decode import Decoder
from dflash_jax.decode_state import DecodeState, ModelParams
from dflash_jax.model import Model, load
from dflash_jax.proposal import Moment
from dflash_jax.sampling import argmax

PROMPT, BUDGET, REPEATS = 64, 160, 5


def start(decoder: Decoder, params: ModelParams) -> DecodeState:
  """A row after its prefill."""
  state = decoder.init_state(1, PROMPT + 2 * BUDGET, BUDGET)
  state = decoder.begin(state, jnp.array([BUDGET]), jnp.zeros(1, jnp.uint32))
  tokens = np.random.default_rng(0).integers(100, 9000, (1, PROMPT))
  return decoder.prefill(
    params, state, tokens, jnp.array([PROMPT]), jnp.array([True])
  )


def time_loop(decoder: Decoder, params: ModelParams) -> float:
  """Seconds per round of the jitted loop."""
  state = jax.block_until_ready(start(decoder, params))
  begin = time.perf_counter()
  while not bool(state.done.all()):
    state = decoder.run_rounds(params, state)
  return (time.perf_counter() - begin) / int(state.rounds[0])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def run_drafter(decoder, params, state, taps, tokens, count, anchor):
  """Absorbs the last round's taps and proposes."""
  drafter = decoder.drafter
  drafter_state = drafter.absorb(params.drafter, state, taps, tokens, count)
  proposal = drafter.propose(
    params.drafter,
    drafter_state,
    anchor,
    params.borrowed,
    decoder.drafting,
    Moment(jnp.zeros(1, jnp.uint32), drafter_state.length),
    jnp.array([BUDGET]),
  )
  return drafter_state, proposal.tokens


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def run_target(decoder, params, tokens, cache, count):
  """One target pass with its head, committed like a round's."""
  target = decoder.target
  hidden, taps, rows = target.forward(
    params.target, tokens, cache, decoder.drafter.taps
  )
  chosen = argmax(target.logits(params.target, hidden))
  return chosen, taps, cache.extend(rows, count)


def time_calls(decoder: Decoder, params: ModelParams) -> float:
  """Seconds per round of the same calls, one by one, two tokens a round."""
  state = start(decoder, params)
  cache, drafter, anchor = state.cache, state.drafter, state.anchor
  count, rounds = jnp.array([2]), BUDGET // 2
  width = decoder.depth + 1
  tokens = jnp.zeros((1, width), jnp.int32)
  tap_width = len(decoder.drafter.taps) * decoder.target.config.width
  taps = jnp.zeros((1, width, tap_width))
  begin = 0.0
  for step in range(rounds + 1):
    drafter, drafts = run_drafter(
      decoder, params, drafter, taps, tokens, count, anchor
    )
    jax.block_until_ready(drafts)
    tokens = jnp.concatenate([anchor[:, None], drafts], axis=1)
    chosen, taps, cache = run_target(decoder, params, tokens, cache, count)
    jax.block_until_ready(chosen)
    anchor = chosen[:, 1]
    if step == 0:  # compiles
      begin = time.perf_counter()
  return (time.perf_counter() - begin) / rounds


def measure(model: Model, width: int) -> None:
  """Prints one line of the table."""
  decode = dataclasses.replace(model.config.decode, width=f"fixed:{width}")
  config = dataclasses.replace(model.config, decode=decode)
  decoder = dataclasses.replace(model, config=config).decoder()
  time_loop(decoder, model.params)
  time_calls(decoder, model.params)
  loops, calls, ratios = [], [], []
  for _ in range(REPEATS):
    loops.append(time_loop(decoder, model.params))
    calls.append(time_calls(decoder, model.params))
    ratios.append(loops[-1] / calls[-1])
  print(
    f"{decoder.depth:6d} {statistics.median(loops) * 1e3:8.1f} "
    f"{statistics.median(calls) * 1e3:8.1f} {statistics.median(ratios):7.3f}",
    flush=True,
  )


def main() -> None:
  """Prints the table, plain decoding first."""
  model = load(read(default_path()))
  plain = model.without_drafter()
  decoder = plain.decoder()
  time_loop(decoder, plain.params)
  times = [time_loop(decoder, plain.params) for _ in range(REPEATS)]
  print("drafts  loop ms calls ms   ratio")
  print(f"{0:6d} {statistics.median(times) * 1e3:8.1f}")
  for width in (1, 2, 3, 4, 5, 7):
    measure(model, width)


if __name__ == "__main__":
  main()
