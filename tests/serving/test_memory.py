"""Plans of memory: every lane's rows, before anything is allocated."""

import pytest

from dflash_jax.serving.memory import plan_rows

LANES = {"a": {1: 10, 2: 20, 4: 40}, "b": {1: 15, 2: 30, 4: 60}}


@pytest.mark.parametrize(
  ("limit", "rows"),
  [
    (None, {"a": 4, "b": 4}),
    (100, {"a": 4, "b": 4}),
    (99, {"a": 4, "b": 2}),
    (50, {"a": 2, "b": 2}),
    (49, {"a": 2, "b": 1}),
    (25, {"a": 1, "b": 1}),
    (24, {"a": 2, "b": 0}),
    (10, {"a": 1, "b": 0}),
    (9, {"a": 0, "b": 0}),
  ],
)
def test_lanes_grow_in_turns_within_the_limit(limit, rows):
  assert plan_rows(LANES, limit) == rows
