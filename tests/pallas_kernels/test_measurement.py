"""One case: right results first, alone and in the loop; then its rows."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import measurement, timing
from pallas_kernels.cases import array
from pallas_kernels.measurement import Machine
from tests.pallas_kernels.stubs import BOTH, MACHINE, double, stub


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(timing, "DISPATCH_SECONDS", 1e-4)
  monkeypatch.setattr(timing, "REPEATS", 3)


def test_rows_of_a_case():
  xla, kernel = measurement.measure(stub(), BOTH, MACHINE)
  assert (xla.case, xla.implementation) == ("op/stub", "xla")
  assert (kernel.implementation, kernel.problem) == ("sm90", "")
  assert kernel.copies == 16 and kernel.calls % kernel.copies == 0
  assert kernel.bytes_per_s == pytest.approx(1024 / kernel.seconds)
  assert kernel.share_of_copy == pytest.approx(1024 / kernel.seconds / 1e9)
  assert kernel.flops_per_s == pytest.approx(128 / kernel.seconds)
  assert kernel.speedup == pytest.approx(xla.seconds / kernel.seconds)
  assert xla.speedup == 1


def test_no_speedup_without_xla():
  (row,) = measurement.measure(stub(), ["sm90"], MACHINE)
  assert row.seconds and row.speedup is None


def _wrong(kind):
  """An implementation that is wrong by more than rounding."""

  def call(x, *, implementation):
    found = double(x, implementation="xla")
    if implementation != "xla":
      found["twice"] = kind(found["twice"])
    return found

  return call


@pytest.mark.parametrize(
  ("kind", "message"),
  [
    (lambda y: y * 1.001, "wrong result.*'twice'.*off by 1.0e-03 in norm"),
    (lambda y: y.at[0, 0].add(0.1), "wrong result.*off by"),
    (lambda y: y.at[3, 3].set(jnp.nan), "wrong result.*off by nan"),
    (lambda y: y[:4], r"float32\(4, 16\), not float32\(8, 16\)"),
    (lambda y: y.astype(jnp.bfloat16), "bfloat16"),
  ],
)
def test_wrong_result_is_not_timed(monkeypatch, kind, message):
  clocked = []
  monkeypatch.setattr(
    timing, "median_seconds", lambda _: clocked.append(1) or 1.0
  )
  xla, kernel = measurement.measure(stub(_wrong(kind)), BOTH, MACHINE)
  assert xla.seconds and len(clocked) == 1
  assert kernel.seconds is None
  assert re.search(message, kernel.problem)


def test_result_that_goes_wrong_in_the_loop_is_not_timed(monkeypatch):
  """Right alone, wrong when it runs again: a race, or an unset buffer."""
  really_repeat = timing.repeat

  def repeat(call, rounds):
    run = really_repeat(call, rounds)
    return lambda copies: jax.tree.map(lambda x: x * 1.1, run(copies))

  monkeypatch.setattr(timing, "repeat", repeat)
  (row,) = measurement.measure(stub(), ["sm90"], MACHINE)
  assert row.seconds is None and "wrong result" in row.problem


@pytest.mark.parametrize(
  ("dtype", "error", "is_wrong"),
  [
    (jnp.float32, 2e-5, False),
    (jnp.float32, 1e-3, True),
    (jnp.bfloat16, 1e-3, False),
    (jnp.bfloat16, 3e-2, True),
    (jnp.float8_e4m3fn, 1.5e-2, False),
    (jnp.float8_e4m3fn, 5e-2, True),
  ],
)
def test_tolerance_is_that_of_the_narrowest_operand(dtype, error, is_wrong):
  operands = (array(8, dtype=dtype), array(8, dtype=jnp.float32))
  case = stub(double, *operands)
  wanted = np.linspace(-1, 1, 100, dtype=np.float32)
  found = measurement.difference(wanted * (1 + error), wanted, case)
  assert bool(found) == is_wrong


def test_choices_may_differ_at_few_ties():
  wanted = np.arange(128)
  for count, is_wrong in ((2, False), (3, True)):
    found = wanted.copy()
    found[:count] += 1
    assert bool(measurement.difference(found, wanted, stub())) == is_wrong
  assert measurement.difference(wanted[:1] + 1, wanted[:1], stub())


def _raising(error, of):
  def call(x, *, implementation):
    if implementation == of:
      raise error
    return double(x, implementation=implementation)

  return call


@pytest.mark.parametrize(
  ("error", "problem"),
  [
    (NotImplementedError("too wide\nsee"), "NotImplementedError: too wide"),
    (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), measurement.NO_MEMORY),
  ],
)
def test_failure_has_a_row(error, problem):
  xla, kernel = measurement.measure(
    stub(_raising(error, "sm90")), BOTH, MACHINE
  )
  assert xla.seconds
  assert (kernel.seconds, kernel.problem) == (None, problem)


def test_without_reference_nothing_is_timed():
  call = _raising(ValueError("no"), "xla")
  rows = list(measurement.measure(stub(call), BOTH, MACHINE))
  assert [row.problem for row in rows] == ["no reference: ValueError: no"] * 2


def test_times_that_cannot_be_are_marked():
  (row,) = measurement.measure(stub(bytes=10**12), ["xla"], MACHINE)
  assert row.seconds and row.problem == "faster than memory"
  huge = dataclasses.replace(MACHINE, cache_bytes=10**9)
  (row,) = measurement.measure(stub(), ["xla"], huge)
  assert row.seconds and row.problem == "operands stay in the cache"


def test_machine_is_measured():
  machine = Machine.measure(2**16)
  assert machine.kind == "cpu"
  assert machine.copy_bytes_per_s > 0 and machine.dispatch_seconds > 0
