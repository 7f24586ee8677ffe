"""The decode loop: prefill, then rounds of draft, verify, commit on the device.

A round reads [anchor, drafts] in one target pass and emits between one token
and all of them plus one. R rounds run inside one jitted call; the host looks
once per call. Plain decoding is this loop with no drafter.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dflash_jax import sampling as sampling_lib
from dflash_jax import verify
from dflash_jax.cache import KVCache
from dflash_jax.drafters.base import Borrowed, Drafter
from dflash_jax.sampling import Sampling
from dflash_jax.target import Params, Target


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelParams:
  """Parameters of everything a round runs."""

  target: Params
  drafter: Params
  borrowed: Borrowed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """Requests in flight, one per row.

  Attributes:
    cache: the target's; holds every token of the row but the anchor.
    drafter: the drafter's own state, as long as the cache.
    anchor: i32[B], last emitted token, not yet read by the target.
    tokens: i32[B, M], the reply so far.
    slots: i32[B, M], the block slot each token was drafted in, 1..K-1; 0 marks
      the target's own correction or bonus token.
    count: i32[B], valid entries of `tokens`.
    budget: i32[B], most tokens a reply may have.
    done: bool[B], budget spent or stop token emitted.
    seeds: u32[B], one noise stream per request.
    rounds: i32[B], target passes after prefill.
    accepted: i32[B, P + 1], rounds by number of drafts accepted.
  """

  cache: KVCache
  drafter: Any
  anchor: jax.Array
  tokens: jax.Array
  slots: jax.Array
  count: jax.Array
  budget: jax.Array
  done: jax.Array
  seeds: jax.Array
  rounds: jax.Array
  accepted: jax.Array


@dataclasses.dataclass(frozen=True)
class Decoder:
  """The loop's static half: what runs, how wide, how it stops.

  Attributes:
    target, drafter: the formulas.
    num_drafts: P, drafts verified per round.
    sampling: how the target chooses.
    stop_ids: tokens that end a reply; the stop token itself is emitted.
    rounds_per_dispatch: R.
    dtype: of both caches.
    early_exit: leave the rounds loop when every row is done. Free on CPU; on a
      GPU the test would make the host wait for the device in every round, so
      there R rounds always run and done rows change nothing.
  """

  target: Target
  drafter: Drafter
  num_drafts: int
  sampling: Sampling = sampling_lib.GREEDY
  stop_ids: tuple[int, ...] = ()
  rounds_per_dispatch: int = 8
  dtype: str = "float32"
  early_exit: bool = False

  @functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
  def init_state(
    self, batch: int, capacity: int, max_new_tokens: int
  ) -> DecodeState:
    """Empty rows.

    Args:
      batch: B.
      capacity: cache slots per row; see `slack`.
      max_new_tokens: longest reply any row may ask for.
    """
    width = max_new_tokens + self.num_drafts + 1  # a round may write past it
    zeros = jnp.zeros((batch,), jnp.int32)
    return DecodeState(
      cache=self.target.init_cache(batch, capacity, self.dtype),
      drafter=self.drafter.init_state(batch, capacity, self.dtype),
      anchor=zeros,
      tokens=jnp.zeros((batch, width), jnp.int32),
      slots=jnp.zeros((batch, width), jnp.int32),
      count=zeros,
      budget=zeros,
      done=jnp.ones((batch,), bool),
      seeds=zeros.astype(jnp.uint32),
      rounds=zeros,
      accepted=jnp.zeros((batch, self.num_drafts + 1), jnp.int32),
    )

  def slack(self, chunk: int) -> int:
    """Cache slots needed past prompt + reply, for rows written but rejected."""
    return max(chunk, self.num_drafts + 1)

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def begin(
    self, state: DecodeState, budget: jax.Array, seeds: jax.Array
  ) -> DecodeState:
    """Opens a reply of at most budget i32[B] tokens; caches are kept."""
    return dataclasses.replace(
      state,
      count=jnp.zeros_like(state.count),
      budget=budget.astype(jnp.int32),
      done=budget <= 0,
      seeds=seeds.astype(jnp.uint32),
      rounds=jnp.zeros_like(state.rounds),
      accepted=jnp.zeros_like(state.accepted),
    )

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def prefill(
    self,
    params: ModelParams,
    state: DecodeState,
    tokens: jax.Array,
    count: jax.Array,
    is_last: jax.Array,
  ) -> DecodeState:
    """Reads a piece of each row's prompt.

    Args:
      params: of target and drafter.
      state: opened by `begin`.
      tokens: i32[B, T], padded at the end.
      count: i32[B], how many of them are real, 0..T.
      is_last: bool[B], rows whose prompt ends in this piece; their first reply
        token is chosen here and becomes the anchor.
    """
    hidden, taps, cache = self.target.forward(
      params.target, tokens, state.cache, self.drafter.taps
    )
    cache = cache.commit(count)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    logits = self.target.logits(
      params.target, jnp.take_along_axis(hidden, last, axis=1)
    )
    chosen = sampling_lib.choose(
      logits, self.sampling, state.seeds, cache.length[:, None]
    )
    state = dataclasses.replace(
      state,
      cache=cache,
      drafter=self.drafter.absorb(
        params.drafter, state.drafter, taps, tokens, count
      ),
    )
    starts = is_last & ~state.done
    return self._emit(state, chosen, jnp.zeros_like(chosen), starts * 1)

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def run_rounds(self, params: ModelParams, state: DecodeState) -> DecodeState:
    """Up to R rounds, in one dispatch, with no look from the host."""

    def body(_, state):
      return self.round(params, state)

    R = self.rounds_per_dispatch
    if not self.early_exit:
      return jax.lax.fori_loop(0, R, body, state)
    _, state = jax.lax.while_loop(
      lambda carry: (carry[0] < R) & ~carry[1].done.all(),
      lambda carry: (carry[0] + 1, body(*carry)),
      (0, state),
    )
    return state

  def round(self, params: ModelParams, state: DecodeState) -> DecodeState:
    """Draft, verify, accept, commit: one target pass for every row."""
    proposal = self.drafter.propose(
      params.drafter,
      state.drafter,
      state.anchor,
      params.borrowed,
      self.num_drafts,
      state.budget - state.count,
    )
    tokens = jnp.concatenate([state.anchor[:, None], proposal.tokens], axis=1)
    hidden, taps, cache = self.target.forward(
      params.target, tokens, state.cache, self.drafter.taps
    )
    chosen = sampling_lib.choose(
      self.target.logits(params.target, hidden),
      self.sampling,
      state.seeds,
      state.cache.positions(self.num_drafts + 1) + 1,
    )
    verdict = verify.match_prefix(proposal, chosen)
    active = ~state.done
    emitted = jnp.where(active, self._truncate(state, verdict), 0)
    # The anchor and all emitted tokens but the last have been read: those rows
    # are committed, and the last emitted token is the next anchor.
    state = dataclasses.replace(
      state,
      cache=cache.commit(emitted),
      drafter=self.drafter.absorb(
        params.drafter, state.drafter, taps, tokens, emitted
      ),
      rounds=state.rounds + active,
      accepted=state.accepted
      + jax.nn.one_hot(verdict.accepted, self.num_drafts + 1, dtype=jnp.int32)
      * active[:, None],
    )
    index = jnp.arange(self.num_drafts + 1, dtype=jnp.int32)
    slots = jnp.where(index < verdict.accepted[:, None], index + 1, 0)
    return self._emit(state, verdict.tokens, slots, emitted)

  def _truncate(self, state: DecodeState, verdict: verify.Verdict) -> jax.Array:
    """i32[B]: tokens to emit, cut at the budget and after a stop token."""
    count = jnp.minimum(verdict.accepted + 1, state.budget - state.count)
    stops = self._is_stop(verdict.tokens)
    before_stop = jnp.cumprod(1 - stops, axis=1).sum(axis=1)
    return jnp.minimum(count, before_stop + 1)

  def _is_stop(self, tokens: jax.Array) -> jax.Array:
    """i32, 1 where a token ends a reply."""
    stops = jnp.array(self.stop_ids or (-1,), jnp.int32)
    return (tokens[..., None] == stops).any(axis=-1).astype(jnp.int32)

  def _emit(
    self,
    state: DecodeState,
    tokens: jax.Array,
    slots: jax.Array,
    emitted: jax.Array,
  ) -> DecodeState:
    """Appends the first emitted i32[B] of tokens i32[B, T] to each reply."""

    def write(buffer, rows, start):
      return jax.lax.dynamic_update_slice(buffer, rows, (start,))

    write_rows = jax.vmap(write)
    last = jnp.maximum(emitted - 1, 0)[:, None]
    newest = jnp.take_along_axis(tokens, last, axis=1)
    count = state.count + emitted
    stopped = self._is_stop(newest)[:, 0] == 1
    return dataclasses.replace(
      state,
      tokens=write_rows(state.tokens, tokens, state.count),
      slots=write_rows(state.slots, slots, state.count),
      count=count,
      anchor=jnp.where(emitted > 0, newest[:, 0], state.anchor),
      done=state.done | ((emitted > 0) & (stopped | (count >= state.budget))),
    )
