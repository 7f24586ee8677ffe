"""Rows of decode states: opened, seated in a batch, arranged anew."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from dflash_jax.cache import Trunk
from dflash_jax.decode import Decoder
from dflash_jax.decode_state import DecodeState


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def reopen(
  decoder: Decoder,
  state: DecodeState,
  length: jax.Array,
  budget: jax.Array,
  seeds: jax.Array,
) -> DecodeState:
  """Rows that forget everything but their first tokens, and begin a reply.

  Args:
    decoder: of the state.
    state: of B rows.
    length: i32[B], tokens that both caches hold, or will when pages have been
      pasted.
    budget: i32[B], most tokens of each reply.
    seeds: u32[B].
  """
  state = decoder.begin(state, budget, seeds)
  return dataclasses.replace(
    state,
    cache=state.cache.reopen(length),
    drafter=decoder.drafter.reopen(state.drafter, length),
  )


@functools.partial(jax.jit, donate_argnums=0)
def seat(
  state: DecodeState,
  arrival: DecodeState,
  place: jax.Array,
  member: jax.Array,
) -> tuple[DecodeState, jax.Array]:
  """Puts the only row of `arrival` at a place i32[] of a batch.

  Args:
    state: the batch.
    arrival: which has no trunk.
    place: row of the batch.
    member: bool[], whether the row begins with the batch's trunk.

  Returns:
    The batch, and the arrival's first token i32[], in a buffer of its own.
  """
  trunk = state.cache.trunk
  if trunk is not None:
    leaning = arrival.cache.lean(trunk, member)
    arrival = dataclasses.replace(arrival, cache=leaning)

  def write(rows, row):
    start = (place,) + (0,) * (rows.ndim - 1)
    return jax.lax.dynamic_update_slice(rows, row, start)

  seated = jax.tree.map(write, _by_row(state), _by_row(arrival))
  return _join(seated, state), arrival.tokens[0, 0]


@jax.jit
def arrange(state: DecodeState, order: jax.Array) -> DecodeState:
  """The rows order i32[B'] of a batch; where it is negative, a done one."""
  places = jnp.maximum(order, 0)
  picked = jax.tree.map(lambda rows: rows[places], _by_row(state))
  picked = dataclasses.replace(picked, done=picked.done | (order < 0))
  return _join(picked, state)


def lean(state: DecodeState, trunk: Trunk | None) -> DecodeState:
  """A batch of which no row is a member, with another trunk or none."""
  member = None
  if trunk is not None:
    member = jnp.zeros(state.done.shape, bool)
  cache = dataclasses.replace(state.cache, trunk=trunk, member=member)
  return dataclasses.replace(state, cache=cache)


def bare(state: DecodeState) -> DecodeState:
  """Without what the host says of rows: laws and stops."""
  return dataclasses.replace(state, laws=None, stops=None)


def _by_row(state: DecodeState) -> DecodeState:
  """What begins with the batch axis."""
  nothing: Any = ()
  return dataclasses.replace(
    bare(state),
    cache=dataclasses.replace(state.cache, trunk=None),
    width=nothing,
    drafts=nothing,
  )


def _join(rows: DecodeState, state: DecodeState) -> DecodeState:
  """Rows with what all rows of a batch share."""
  cache = dataclasses.replace(rows.cache, trunk=state.cache.trunk)
  return dataclasses.replace(
    rows, cache=cache, width=state.width, drafts=state.drafts
  )
