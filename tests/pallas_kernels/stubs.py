"""Stubs of operations and of a machine: their times mean nothing."""

import threading
import time

import jax.numpy as jnp

from pallas_kernels.cases import Case, array
from pallas_kernels.measurement import Machine

MACHINE = Machine("cpu", 4096, 1e-5, 1e9)
BOTH = ("xla", "sm90")


def double(x, *, implementation):
  """A stub of an operation, right in both implementations."""
  return {"twice": x + x if implementation == "xla" else 2 * x}


def stub(call=double, *operands, name="op/stub", **fields):
  operands = operands or (array(8, 16, dtype=jnp.float32),)
  fields = dict(bytes=1024, flops=128) | fields
  return Case(name=name, call=call, operands=operands, **fields)


def wait_forever():
  """A stub of a kernel whose barrier nobody arrives at."""
  threading.Event().wait()


def work(seconds):
  """A stub of a slow one, that prints nothing."""
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    pass
