"""The shapes that are compiled and timed: named, callable, fairly counted."""

import collections
import functools
import importlib

import jax
import numpy as np
import pytest

from pallas_kernels.compile_check import ASSEMBLED, OPERATIONS, cases
from pallas_kernels.timing import total_bytes

CASES = [case for case, _ in cases("sm90")]


def test_names_tell_cases_apart():
  counts = collections.Counter(case.name for case in CASES)
  assert not [name for name, count in counts.items() if count > 1]


def test_every_operation_has_cases_and_budgets():
  found = {case.name.partition("/")[0] for case in CASES}
  assert found == set(OPERATIONS)
  for operation in OPERATIONS:
    config = importlib.import_module(f"pallas_kernels.{operation}.config")
    assert set(config.BUDGETS) == {kernel for _, kernel in ASSEMBLED.values()}


def test_cases_are_chosen_by_their_names():
  some = cases("sm100", "qwen3-8b")
  assert 0 < len(some) < len(CASES)
  assert all("qwen3-8b" in case.name for case, _ in some)
  assert not cases("sm90", "no such case")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_can_be_called_and_moves_what_it_says(case):
  call = functools.partial(case.call, implementation="xla")
  results = jax.tree.leaves(jax.eval_shape(call, *case.operands))
  assert results
  written = sum(x.dtype.itemsize * int(np.prod(x.shape)) for x in results)
  # Some read an operand twice: what they learn of a row decides how to go on.
  assert 0 < case.bytes <= 2 * (total_bytes(case.operands) + written)
  assert case.flops > 0
