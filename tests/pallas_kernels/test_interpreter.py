"""The process that interprets kernels: hangs are seen, and soon."""

import time

import pytest

from tests.pallas_kernels.interpreter import HANG, LOOK, LOOKS, Job, run

WAIT = "tests.pallas_kernels.stubs:wait_forever"
WORK = "tests.pallas_kernels.stubs:work"

pytestmark = pytest.mark.kernels


def test_a_kernel_that_waits_forever_hangs_long_before_the_timeout():
  begin = time.monotonic()
  slow = Job(WORK, dict(seconds=1.25 * LOOK * LOOKS))
  first, second = run([slow, Job(WAIT, {})], timeout=600)
  assert first != HANG and second == HANG
  assert time.monotonic() - begin < 300


def test_a_kernel_that_works_forever_hangs_at_the_timeout():
  assert run([Job(WORK, dict(seconds=600))], timeout=10) == [HANG]
