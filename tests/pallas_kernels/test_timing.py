"""Operands as described, and a loop in which every call is made."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import timing
from pallas_kernels.cases import array

# --- Operands -----------------------------------------------------------------


def test_operands_are_made_as_described():
  key = jax.random.key(0)
  normal = array(64, 65, dtype=jnp.bfloat16).make(key)
  assert normal.dtype == jnp.bfloat16
  assert 0.9 < float(normal.astype(jnp.float32).std()) < 1.1
  narrow = array(1000, dtype=jnp.float8_e4m3fn).make(key)
  assert narrow.dtype == jnp.float8_e4m3fn
  assert 0.8 < float(narrow.astype(jnp.float32).std()) < 1.2
  assert not array(9, dtype=jnp.int32).make(key).any()
  few = np.asarray(array(1000, dtype=jnp.int32, low=-2, high=3).make(key))
  assert set(few) == {-2, -1, 0, 1, 2, 3}
  bits = array(1000, dtype=jnp.uint32, high=2**32 - 1).make(key)
  assert np.asarray(bits).max() > 2**31 and len(set(bits.tolist())) == 1000


def test_copies_fill_the_cache_twice():
  operands = (array(256, dtype=jnp.float32), [array(3, dtype=jnp.int32)])
  assert timing.total_bytes(operands) == 1036
  assert timing.num_copies(operands, 5180) == 10
  assert timing.num_copies(operands, 5181) == 11
  assert timing.num_copies(operands, 100) == timing.MIN_COPIES
  assert timing.num_copies(operands, 10**9) == timing.MAX_COPIES


def test_copies_are_equal_and_apart():
  operands = (array(256, dtype=jnp.float32), [array(3, dtype=jnp.int32)])
  copies = timing.make_copies(operands, 3)
  pointers = {copy[0].unsafe_buffer_pointer() for copy in copies}
  assert len(copies) == len(pointers) == 3
  for copy in copies:
    np.testing.assert_array_equal(copy[0], copies[0][0])
    assert copy[1][0].shape == (3,)


# --- The loop -----------------------------------------------------------------


@pytest.mark.parametrize("results_used", ["all", "one"])
def test_every_call_is_made(results_used):
  """Neither dropped, nor merged, nor moved out of the loop."""
  seen = []

  def note(x):
    seen.append(float(x[0]))
    return x * 2

  def call(x):
    kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
    once = jax.pure_callback(note, kind, x)
    return (once, x) if results_used == "all" else once.sum()

  copies = timing.make_copies((array(4, dtype=jnp.float32),), 3)
  results = timing.repeat(call, 5)(copies)
  jax.block_until_ready(results)
  assert len(seen) == 5 * 3
  assert len(results) == 3


def _loop_body():
  """The compiled loop's body: three calls, if they are still there."""
  call = jax.jit(lambda x, y: jnp.tanh(x @ y))
  copies = [(jnp.ones((64, 64)), jnp.ones((64, 64)))] * 3
  text = timing.repeat(call, 7).lower(copies).compile().as_text()
  name = re.search(r" while\(.*body=%([\w.]+)", text)[1]
  start = text.index(f"\n%{name} (")
  return text[start : text.index("\n}", start)]


def _calls(body):
  return re.findall(r"fusion\(.*/tanh", body)


def test_calls_stay_in_the_loop_and_nothing_is_copied_there():
  body = _loop_body()
  assert len(_calls(body)) == 3
  assert " copy(" not in body
  assert " opt-barrier(" not in body  # costs nothing


def test_calls_would_leave_the_loop_without_barriers(monkeypatch):
  monkeypatch.setattr(jax.lax, "optimization_barrier", lambda x: x)
  assert not _calls(_loop_body())


def test_results_are_those_of_each_copy():
  copies = [(jnp.full(4, float(value)),) for value in (1, 2, 3)]
  results = timing.repeat(lambda x: {"a": x + 1}, 2)(copies)
  assert [float(result["a"][0]) for result in results] == [2, 3, 4]


def test_rounds_fill_a_dispatch(monkeypatch):
  monkeypatch.setattr(timing, "DISPATCH_SECONDS", 0.05)
  assert timing.choose_rounds(1e-3, 5) == 10
  assert timing.choose_rounds(10.0, 5) == 1
  assert timing.choose_rounds(-1e-5, 100) * 100 == timing.MAX_CALLS
