"""Where a round's time goes: draft, verify, commit, and the host.

The loop runs its rounds inside one program, where no clock can look. So the
parts of Decoder.round are jitted one by one and timed apart; a whole dispatch
is timed beside them, and the record says how well the parts add up to it.
"""

import dataclasses
import functools
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.costs import ENDLESS
from dflash_jax.decode import Decoder
from dflash_jax.decode_state import DecodeState, ModelParams
from dflash_jax.model import Model
from dflash_jax.session import bucket
from dflash_jax.width import Fixed

PASSES = 7  # timed dispatches, and as many rounds in parts; medians count
PROMPT = 64  # tokens, at most, that a row has read before


@dataclasses.dataclass(frozen=True)
class Sizes:
  """What is decoded: rows, cache slots per row, and the longest reply."""

  batch: int
  capacity: int
  max_new_tokens: int


def split_round(model: Model, sizes: Sizes) -> dict[str, Any]:
  """Milliseconds of a round and its parts; protocol.PROTOCOL says how.

  Adaptive widths are measured at the widest: the split is of one width.

  Returns:
    "draft_ms", "verify_ms", "commit_ms", "host_ms" of a round; "whole_ms", of
    a round inside a dispatch; "parts_over_whole", the first four over that;
    "width", nodes verified; and the sizes.
  """
  # Its rows never end, so that every round does its work.
  decoder = dataclasses.replace(
    model.decoder(),
    stop_ids=(),
    policy=Fixed(model.decoder().drafting.num_nodes),
  )
  params = model.params
  start = _start(decoder, params, sizes)
  rounds = decoder.rounds_per_dispatch
  idle = dataclasses.replace(decoder, rounds_per_dispatch=0)

  def measure() -> tuple[float, ...]:
    """Seconds of a round: draft, verify, commit, host; and all of it."""
    parts = _time_parts(decoder, params, _copy(start))
    host = _time_dispatch(idle, params, _copy(start))
    whole = _time_dispatch(decoder, params, _copy(start))
    return *parts, host / rounds, whole / rounds

  measure()  # compiles
  # The parts and the whole take turns, so that slow moments hit both.
  passes = np.array([measure() for _ in range(PASSES)])
  names = ("draft_ms", "verify_ms", "commit_ms", "host_ms", "whole_ms")
  medians = 1e3 * np.median(passes, axis=0)
  shares = passes[:, :4].sum(axis=1) / passes[:, 4]
  return {
    **{n: round(float(ms), 4) for n, ms in zip(names, medians, strict=True)},
    "parts_over_whole": round(float(np.median(shares)), 4),
    "width": decoder.drafting.num_nodes,
    "rounds_per_dispatch": rounds,
    **dataclasses.asdict(sizes),
  }


def describe_memory(model: Model, sizes: Sizes) -> dict[str, Any]:
  """Bytes of what is held while these sizes are decoded."""
  decoder = model.decoder()
  chunk = bucket(sizes.capacity, model.config.decode.prefill_chunk)
  state = jax.eval_shape(
    lambda: decoder.init_state(
      sizes.batch, sizes.capacity + decoder.slack(chunk), sizes.max_new_tokens
    )
  )
  target = _leaves(model.params.target)
  borrowed = {
    key: leaf
    for key, leaf in _leaves(model.params.borrowed).items()
    if key not in target
  }
  peak, of = _peak()
  return {
    "target_bytes": _bytes(target.values()),
    "drafter_bytes": model.drafter_bytes,
    "trimmed_head_bytes": _bytes(borrowed.values()),
    "target_cache_bytes": _bytes(jax.tree.leaves(state.cache)),
    "drafter_cache_bytes": _bytes(jax.tree.leaves(state.drafter)),
    "peak_bytes": peak,
    "peak_of": of,
  }


def _new_state(decoder: Decoder, sizes: Sizes) -> DecodeState:
  """Empty rows, with room for a dispatch that accepts everything."""
  rounds = decoder.rounds_per_dispatch * (decoder.depth + 1)
  capacity = max(sizes.capacity, PROMPT + rounds) + decoder.slack(PROMPT)
  return decoder.init_state(sizes.batch, capacity, sizes.max_new_tokens)


def _start(decoder: Decoder, params: ModelParams, sizes: Sizes) -> DecodeState:
  """Rows after their prefill, with a budget that no dispatch reaches."""
  state = _new_state(decoder, sizes)
  rows = sizes.batch
  state = decoder.begin(
    state,
    jnp.full((rows,), ENDLESS, jnp.int32),
    jnp.arange(rows, dtype=jnp.uint32),
  )
  length = max(min(PROMPT, sizes.capacity // 2), 1)
  vocab = decoder.target.config.vocab_size
  tokens = np.random.default_rng(0).integers(0, vocab, (rows, length))
  return decoder.prefill(
    params,
    state,
    tokens.astype(np.int32),
    jnp.full((rows,), length, jnp.int32),
    jnp.ones((rows,), bool),
  )


def _copy(state: DecodeState) -> DecodeState:
  return jax.block_until_ready(jax.tree.map(jnp.copy, state))


@functools.partial(jax.jit, static_argnums=0)
def _propose(decoder, params, state):
  return decoder.propose(params, state)


@functools.partial(jax.jit, static_argnums=0)
def _verify(decoder, params, state, proposal):
  return decoder.verify(params, state, proposal, proposal.num_nodes)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _commit(decoder, params, state, read):
  return decoder.commit(params, state, read)


def _time_parts(
  decoder: Decoder, params: ModelParams, state: DecodeState
) -> tuple[float, float, float]:
  """Seconds of a round's draft, verify and commit, over a dispatch's rounds."""
  clock = np.zeros((decoder.rounds_per_dispatch, 4))
  for times in clock:
    times[0] = time.perf_counter()
    proposal = jax.block_until_ready(_propose(decoder, params, state))
    times[1] = time.perf_counter()
    read = jax.block_until_ready(_verify(decoder, params, state, proposal))
    times[2] = time.perf_counter()
    state = jax.block_until_ready(_commit(decoder, params, state, read))
    times[3] = time.perf_counter()
  draft, verify, commit = np.diff(clock, axis=1).mean(axis=0).tolist()
  return draft, verify, commit


def _time_dispatch(
  decoder: Decoder, params: ModelParams, state: DecodeState
) -> float:
  """Seconds from a dispatch's launch to the host's look, as in a Session."""
  begun = time.perf_counter()
  state = decoder.run_rounds(params, state)
  jax.device_get((state.done, state.count, state.drafts))
  return time.perf_counter() - begun


def _leaves(tree: Any) -> dict[int, Any]:
  """Arrays of a tree, each once."""
  return {id(leaf): leaf for leaf in jax.tree.leaves(tree)}


def _bytes(leaves: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _peak() -> tuple[int, str]:
  """The most bytes held so far, and by what."""
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return int(stats["peak_bytes_in_use"]), device.device_kind
  kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return kibibytes * 1024, "the process"
