"""Seconds per call on a device: many calls in one dispatch, nothing cached.

Copies of the operands take turns, so many that none is left in the cache when
its turn comes again. Every result is kept, and every call depends on the loop,
so the compiler can neither drop a call nor move it out of the loop. The
program, not Python, starts the calls, one after the other.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.cases import Operand

MIN_COPIES, MAX_COPIES = 2, 128
DISPATCH_SECONDS = 0.05  # of one dispatch, about
MAX_CALLS = 10_000  # of one dispatch
REPEATS = 7


def total_bytes(operands: Any) -> int:
  """Of abstract operands."""
  return sum(operand.num_bytes for operand in jax.tree.leaves(operands))


def num_copies(operands: Any, cache_bytes: int) -> int:
  """Copies that together fill the cache twice, as far as that is feasible."""
  count = -(-2 * cache_bytes // total_bytes(operands))
  return min(max(MIN_COPIES, count), MAX_COPIES)


def make_copies(operands: Any, count: int) -> list[Any]:
  """Arrays for abstract operands, and buffers of their own for each copy."""
  leaves, form = jax.tree.flatten(operands)
  # Other generators need memory of several times the array's size.
  keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
  first = [
    jax.jit(Operand.make, static_argnums=0)(operand, key)
    for operand, key in zip(leaves, keys, strict=True)
  ]
  others = [[jnp.array(x, copy=True) for x in first] for _ in range(count - 1)]
  return [jax.tree.unflatten(form, copy) for copy in (first, *others)]


def repeat(
  call: Callable[..., Any], rounds: int
) -> Callable[[list[Any]], list[Any]]:
  """A program that calls once per copy, `rounds` times over.

  Args:
    call: of a copy's operands.
    rounds: how often every copy has its turn.

  Returns:
    Jitted: copies of the operands -> result of each copy's last call.
  """
  call = jax.jit(call)  # for all copies, traced once

  @jax.jit
  def run(copies: list[Any]) -> list[Any]:
    def visit_all(_, carry):
      token, results = carry
      results = []
      for operands in copies:
        # The token ties a call to the loop and to its predecessor, at no cost:
        # barriers are gone by the time code is made.
        operands, token = lax.optimization_barrier((operands, token))
        result, token = lax.optimization_barrier((call(*operands), token))
        results.append(result)
      return token + 1, results

    blank = [
      jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(call, *operands)
      )
      for operands in copies
    ]
    return lax.fori_loop(0, rounds, visit_all, (jnp.int32(0), blank))[1]

  return run


def choose_rounds(seconds: float, count: int) -> int:
  """Rounds for a dispatch, if a call takes some seconds and copies count."""
  calls = min(DISPATCH_SECONDS / max(seconds, 1e-9), MAX_CALLS)
  return max(1, round(calls / count))


def clock(run: Callable[[], Any]) -> float:
  """Seconds until the result of one dispatch is there."""
  begin = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - begin


def median_seconds(run: Callable[[], Any]) -> float:
  """Of a dispatch that has run before."""
  return statistics.median(clock(run) for _ in range(REPEATS))


def dispatch_seconds() -> float:
  """What a dispatch costs by itself."""
  add, zero = jax.jit(lambda x: x + 1), jnp.zeros(8)
  jax.block_until_ready(add(zero))
  return median_seconds(lambda: add(zero))
