"""No drafter: every round emits the target's one next token."""

import dataclasses

import jax
import jax.numpy as jnp

from dflash_jax.cache import Pages
from dflash_jax.drafters.base import Borrowed, Params, State
from dflash_jax.proposal import Drafting, Moment, Proposal, chain


@dataclasses.dataclass(frozen=True)
class NoDrafter:
  """Proposes nothing, which makes the decode loop plain decoding."""

  taps: tuple[int, ...] = ()
  max_drafts: int = 0
  reads_drafts: bool = False
  rereads: int = 0

  def init_state(self, batch: int, capacity: int, dtype: str) -> State:
    """An empty pytree."""
    del batch, capacity, dtype
    return ()

  def absorb(
    self,
    params: Params,
    state: State,
    taps: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
  ) -> State:
    """Keeps nothing."""
    del params, taps, tokens, count
    return state

  def reopen(self, state: State, length: jax.Array) -> State:
    """Nothing to forget."""
    del length
    return state

  def cut(
    self, state: State, row: jax.Array, start: jax.Array, shape: Pages
  ) -> State:
    """Nothing to keep."""
    del row, start, shape
    return state

  def paste(
    self, state: State, row: jax.Array, start: jax.Array, pages: State
  ) -> State:
    """Nothing to give."""
    del row, start, pages
    return state

  def propose(
    self,
    params: Params,
    state: State,
    anchor: jax.Array,
    borrowed: Borrowed,
    drafting: Drafting,
    moment: Moment,
    remaining: jax.Array,
  ) -> Proposal:
    """The empty chain."""
    del params, state, borrowed, drafting, moment, remaining
    return chain(jnp.zeros((anchor.shape[0], 0), jnp.int32))
