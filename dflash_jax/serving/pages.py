"""Pages on the device: what target and drafter made of shared prefixes.

One number stands for a page of both, so a row that takes a prefix from here
has the drafter's context for it too. (Engines that keep them apart lose
acceptance wherever only the target's part is found: vLLM #47930.) Rows and
trunks own copies, and a page is never written again while anybody uses it: a
fork of a text is a row that begins with the same pages.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.cache import Pages, Trunk
from dflash_jax.decode_state import DecodeState
from dflash_jax.drafters.base import Drafter
from dflash_jax.serving.prefixes import VOID

AT_ONCE = 8  # pages that one call moves

# Per layer f[count + 1, ...] of target and drafter, one entry per number.
Store = Any


def create(drafter: Drafter, row: DecodeState, size: int, count: int) -> Store:
  """An empty store of `count` pages.

  Args:
    drafter: whose context is kept beside the target's.
    row: a state of one row, or its shapes.
    size: tokens of a page.
    count: pages; number VOID comes on top.
  """
  shapes = shapes_of(drafter, row, size)
  return jax.tree.map(
    lambda x: jnp.zeros((count + 1, *x.shape), x.dtype), shapes
  )


def shapes_of(drafter: Drafter, row: DecodeState, size: int) -> Store:
  """One page, as shapes."""
  cut = functools.partial(_cut, drafter, shape=Pages(1, size))
  pages = jax.eval_shape(cut, row, 0, 0)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), pages
  )


def batches(numbers: dict[int, int]) -> list[tuple[int, np.ndarray]]:
  """Splits pages into calls.

  Args:
    numbers: of the pages at some places of a text, counted in pages.

  Returns:
    (first place, numbers i32[AT_ONCE]) of each call; VOID where there is none.
  """
  calls: dict[int, np.ndarray] = {}
  for place, number in numbers.items():
    first = place // AT_ONCE * AT_ONCE
    call = calls.setdefault(first, np.full((AT_ONCE,), VOID, np.int32))
    call[place - first] = number
  return sorted(calls.items())


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=1)
def keep(
  drafter: Drafter,
  store: Store,
  state: DecodeState,
  row: jax.Array,
  call: tuple[jax.Array, jax.Array],
  size: int,
) -> Store:
  """Copies pages out of a row.

  Args:
    drafter: whose context is kept beside the target's.
    store: of `create`.
    state: whose row i32[] is read.
    row: of the state.
    call: of `batches`.
    size: tokens of a page.
  """
  first, numbers = call
  cut = _cut(drafter, state, row, first * size, Pages(AT_ONCE, size))
  return jax.tree.map(
    lambda pages, new: pages.at[numbers].set(new.astype(pages.dtype)),
    store,
    cut,
  )


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def give(
  drafter: Drafter,
  store: Store,
  state: DecodeState,
  call: tuple[jax.Array, jax.Array],
  size: int,
) -> DecodeState:
  """Copies pages into the only row of a state; its lengths stay the same."""
  (first, numbers), row = call, jnp.zeros((), jnp.int32)
  target, context = jax.tree.map(lambda pages: pages[numbers], store)
  return dataclasses.replace(
    state,
    cache=state.cache.paste(row, first * size, target),
    drafter=drafter.paste(state.drafter, row, first * size, context),
  )


@jax.jit
def join(store: Store, numbers: jax.Array, length: jax.Array) -> Trunk:
  """The target's part of pages, as a trunk.

  Args:
    store: of `create`.
    numbers: i32[N], of the trunk's pages from its start, then VOID.
    length: i32[], tokens of it that are not void.
  """

  def side_by_side(pages):
    taken = pages[numbers].swapaxes(0, 1)
    return taken.reshape(taken.shape[0], -1, taken.shape[-1])

  target, _ = store
  rows = jax.tree.map(side_by_side, target)
  return Trunk(rows.keys, rows.values, length)


def _cut(
  drafter: Drafter,
  state: DecodeState,
  row: jax.Array,
  start: jax.Array,
  shape: Pages,
) -> tuple[Any, Any]:
  """What target and drafter have of some tokens of a row, in pages."""
  return (
    state.cache.cut(row, start, shape),
    drafter.cut(state.drafter, row, start, shape),
  )
