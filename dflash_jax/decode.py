"""The decode loop: prefill, then rounds of draft, verify, commit on the device.

A round reads [anchor, drafts] in one target pass and emits between one token
and all of them plus one. R rounds run inside one jitted call; the host looks
once per call. Plain decoding is this loop with no drafter. A width policy may
verify fewer nodes than were drafted, or leave the drafter out for a while.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dflash_jax import sampling as sampling_lib
from dflash_jax.config import ConfigError
from dflash_jax.decode_state import DecodeState, ModelParams, Read
from dflash_jax.drafters.base import Drafter
from dflash_jax.laws import Laws
from dflash_jax.proposal import Drafting, Moment, Proposal
from dflash_jax.sampling import Sampling
from dflash_jax.target import Target
from dflash_jax.tree import chain
from dflash_jax.verify import Verdict, Verifier
from dflash_jax.width import BURST, Fixed, Outcome, Policy


def check_pairing(drafter: Drafter, drafting: Drafting, policy: Policy) -> None:
  """Raises ConfigError for a drafter, drafts and widths that do not fit."""
  if not drafter.reads_drafts or drafting.is_certain:
    return
  if drafting.is_tree:
    raise ConfigError(
      "this drafter reads its own drafts, and no rule is lossless for trees of "
      "them when they are drawn; set draft_temperature=0 or tree_nodes=0"
    )
  if policy.weighs_all:
    raise ConfigError(
      "width='goodput' weighs all drafts at once, and this drafter's later "
      "ones depend on the tokens drawn before: the width would leak them and "
      "bias the output; set draft_temperature=0, or a fixed or threshold width"
    )


@dataclasses.dataclass(frozen=True)
class Decoder:
  """The loop's static half: what runs, how wide, how it stops.

  Attributes:
    target, drafter: the formulas.
    drafting: what the drafter is asked for, P nodes.
    policy: how many of them are verified.
    rule: of verification.
    sampling: the target's law.
    stop_ids: tokens that end a reply; the stop token itself is emitted.
    rounds_per_dispatch: R.
    dtype: of both caches.
    early_exit: leave the rounds loop when every row is done. Free on CPU; on a
      GPU the test would make the host wait for the device in every round, so
      there R rounds always run and done rows change nothing.
  """

  target: Target
  drafter: Drafter
  drafting: Drafting
  policy: Policy = Fixed()
  rule: str = "greedy"
  sampling: Sampling = sampling_lib.GREEDY
  stop_ids: tuple[int, ...] = ()
  rounds_per_dispatch: int = 8
  dtype: str = "float32"
  early_exit: bool = False

  def __post_init__(self):
    self.verifier.check(self.drafting)
    check_pairing(self.drafter, self.drafting, self.policy)

  @property
  def verifier(self) -> Verifier:
    """The rule, bound to the law it keeps."""
    return Verifier(self.rule, self.sampling, self.depth)

  @property
  def guarantee(self) -> str:
    """Key of verify.GUARANTEES: what the output shares with plain decoding."""
    return self.verifier.guarantee(self.drafting)

  @property
  def depth(self) -> int:
    """D, the most drafts a round can accept."""
    return min(self.drafting.num_nodes, self.drafter.max_drafts)

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
    width = max_new_tokens + self.depth + 1  # a round may write past it
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
      accepted=jnp.zeros((batch, self.depth + 1), jnp.int32),
      verified=zeros,
      width=self.policy.init_state(self.depth),
      drafts=jnp.ones((), bool),
    )

  def slack(self, chunk: int) -> int:
    """Cache slots needed past prompt + reply, for rows written but rejected."""
    return max(chunk, self.depth + 1, BURST)

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
      verified=jnp.zeros_like(state.verified),
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
    hidden, taps, rows = self.target.forward(
      params.target, tokens, state.cache, self.drafter.taps
    )
    cache = state.cache.extend(rows, count)
    last = jnp.maximum(count - 1, 0)[:, None, None]
    prediction = self.target.predict(
      params.target, jnp.take_along_axis(hidden, last, axis=1)
    )
    chosen = prediction.choose(
      self._law(state), state.seeds, cache.length[:, None]
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
    state = self._repeat(
      self.rounds_per_dispatch,
      lambda _, state: self.round(params, state),
      state,
      lambda state: state.done.all() | ~self._wants_drafts(params, state),
    )
    return dataclasses.replace(state, drafts=self._wants_drafts(params, state))

  def round(self, params: ModelParams, state: DecodeState) -> DecodeState:
    """Draft, verify, accept, commit: one target pass for every row."""
    proposal = self.propose(params, state)
    widths = self.policy.widths(proposal.num_nodes)
    if len(widths) == 1:
      read, _ = self.verify(params, state, proposal, widths[0])
      return self.commit(params, state, read)
    nodes = proposal.tree or chain(*proposal.tokens.shape)
    index = self.policy.choose(
      state.width,
      proposal.confidence,
      proposal.margins,
      nodes,
      ~state.done,
      params.costs,
    )
    # Branches only read the caches: buffers that a branch wrote to would be
    # copied in and out of it.
    branches = [
      functools.partial(self.verify, params, proposal=proposal, width=width)
      for width in widths
    ]
    read, outcome = jax.lax.switch(index, branches, state)
    outcome = dataclasses.replace(outcome, index=index)
    seen = self.policy.observe(state.width, outcome, params.costs)
    state = dataclasses.replace(state, width=seen)
    return self.commit(params, state, read)

  def propose(self, params: ModelParams, state: DecodeState) -> Proposal:
    """Has the drafter offer what may follow the anchors; changes nothing."""
    return self.drafter.propose(
      params.drafter,
      state.drafter,
      state.anchor,
      params.borrowed,
      self.drafting,
      Moment(state.seeds, state.cache.length),
      state.budget - state.count,
    )

  def verify(
    self,
    params: ModelParams,
    state: DecodeState,
    proposal: Proposal,
    width: int,
  ) -> tuple[Read, Outcome]:
    """Has the target judge the first `width` nodes; changes nothing."""
    nodes = proposal.prefix(width)
    tokens = jnp.concatenate([state.anchor[:, None], nodes.tokens], axis=1)
    hidden, taps, rows = self.target.forward(
      params.target, tokens, state.cache, self.drafter.taps, nodes.tree
    )
    prediction = self.target.predict(params.target, hidden)
    moment = Moment(state.seeds, state.cache.length)
    verdict = self.verifier.judge(nodes, prediction, moment, state.laws)
    active = ~state.done
    emitted = jnp.where(active, self._truncate(state, verdict), 0)
    outcome = Outcome.create(
      proposal, width, verdict, emitted, active, prediction, self.policy
    )
    if verdict.path is not None:
      rows = rows.follow(verdict.path)
      taps = jnp.take_along_axis(taps, verdict.path[..., None], axis=1)
      tokens = jnp.take_along_axis(tokens, verdict.path, axis=1)
    missing = self.depth + 1 - tokens.shape[1]
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (0, missing)))
    read = Read(
      rows=rows.pad(self.depth + 1),
      taps=jnp.pad(taps, ((0, 0), (0, missing), (0, 0))),
      tokens=pad(tokens),
      verdict=Verdict(pad(verdict.tokens), verdict.accepted),
      emitted=emitted,
      width=jnp.int32(width),
    )
    return read, outcome

  def commit(
    self, params: ModelParams, state: DecodeState, read: Read
  ) -> DecodeState:
    """Emits what a pass decided, and keeps what it read on the way.

    The anchor and all emitted tokens but the last have been read: those rows
    are committed, and the last emitted token is the next anchor.
    """
    active, accepted = ~state.done, read.verdict.accepted
    bins = jax.nn.one_hot(accepted, self.depth + 1, dtype=jnp.int32)
    state = dataclasses.replace(
      state,
      cache=state.cache.extend(read.rows, read.emitted),
      drafter=self.drafter.absorb(
        params.drafter, state.drafter, read.taps, read.tokens, read.emitted
      ),
      rounds=state.rounds + active,
      accepted=state.accepted + bins * active[:, None],
      verified=state.verified + read.width * active,
    )
    index = jnp.arange(self.depth + 1, dtype=jnp.int32)
    slots = jnp.where(index < accepted[:, None], index + 1, 0)
    return self._emit(state, read.verdict.tokens, slots, read.emitted)

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
  def run_plain(self, params: ModelParams, state: DecodeState) -> DecodeState:
    """BURST plain rounds in one dispatch, for a policy that rests.

    The drafter absorbs what they read at once, at the end: one that rests
    costs a copy of the taps per token, not a pass.
    """
    B = state.anchor.shape[0]
    width = len(self.drafter.taps) * self.target.config.width
    taps = jnp.zeros((B, BURST, width), jnp.float32)

    def body(step, carry):
      state, tokens, taps = carry
      read = state.anchor
      hidden, states, rows = self.target.forward(
        params.target, read[:, None], state.cache, self.drafter.taps
      )
      chosen = self.target.predict(params.target, hidden).choose(
        self._law(state), state.seeds, state.cache.length[:, None] + 1
      )
      active = ~state.done
      state = dataclasses.replace(
        state,
        cache=state.cache.extend(rows, active * 1),
        rounds=state.rounds + active,
        accepted=state.accepted.at[:, 0].add(active),
      )
      state = self._emit(state, chosen, jnp.zeros_like(chosen), active * 1)
      taps = taps.at[:, step].set(states[:, 0])
      return state, tokens.at[:, step].set(read), taps

    before = state.count
    start = (state, jnp.zeros((B, BURST), jnp.int32), taps)
    state, tokens, taps = self._repeat(
      BURST, body, start, lambda carry: carry[0].done.all()
    )
    drafter = self.drafter.absorb(
      params.drafter, state.drafter, taps, tokens, state.count - before
    )
    state = dataclasses.replace(
      state, drafter=drafter, width=self.policy.rest(state.width)
    )
    return dataclasses.replace(state, drafts=self._wants_drafts(params, state))

  def _wants_drafts(self, params: ModelParams, state: DecodeState) -> jax.Array:
    if not self.policy.rests:
      return jnp.ones((), bool)
    return self.policy.should_draft(state.width, params.costs)

  def _repeat(self, count: int, body, carry, is_over):
    """Runs body(step, carry) `count` times; on CPUs, until it is over."""
    if not self.early_exit:
      return jax.lax.fori_loop(0, count, body, carry)
    _, carry = jax.lax.while_loop(
      lambda pair: (pair[0] < count) & ~is_over(pair[1]),
      lambda pair: (pair[0] + 1, body(*pair)),
      (jnp.int32(0), carry),
    )
    return carry

  def _truncate(self, state: DecodeState, verdict: Verdict) -> jax.Array:
    """i32[B]: tokens to emit, cut at the budget and after a stop token."""
    count = jnp.minimum(verdict.accepted + 1, state.budget - state.count)
    stops = self._is_stop(state, verdict.tokens)
    before_stop = jnp.cumprod(1 - stops, axis=1).sum(axis=1)
    return jnp.minimum(count, before_stop + 1)

  def _law(self, state: DecodeState) -> Sampling | Laws:
    return self.sampling if state.laws is None else state.laws

  def _is_stop(self, state: DecodeState, tokens: jax.Array) -> jax.Array:
    """i32[B, T], 1 where one of tokens i32[B, T] ends a reply."""
    stops = jnp.array(self.stop_ids or (-1,), jnp.int32)
    if state.stops is not None:
      stops = jnp.asarray(state.stops)[:, None]
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
    stopped = self._is_stop(state, newest)[:, 0] == 1
    return dataclasses.replace(
      state,
      tokens=write_rows(state.tokens, tokens, state.count),
      slots=write_rows(state.slots, slots, state.count),
      count=count,
      anchor=jnp.where(emitted > 0, newest[:, 0], state.anchor),
      done=state.done | ((emitted > 0) & (stopped | (count >= state.budget))),
    )
