"""Bytes of everything the engine allocates, known before it does."""

from collections.abc import Mapping
from typing import Any

import jax


def bytes_of(shapes: Any) -> int:
  """Of a pytree of arrays or their shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def plan_rows(
  lanes: Mapping[str, Mapping[int, int]], limit: int | None
) -> dict[str, int]:
  """How many rows each lane may have at once.

  Lanes grow in turns, from their smallest size on, in the order they are named,
  for as long as all of them together stay within the limit.

  Args:
    lanes: per lane, the bytes that it takes at most with up to so many rows,
      sizes ascending.
    limit: bytes; None for no limit.

  Returns:
    A size of each lane; 0 where not even the smallest fits.
  """
  if limit is None:
    return {name: max(sizes) for name, sizes in lanes.items()}
  rows = dict.fromkeys(lanes, 0)
  taken = dict.fromkeys(lanes, 0)
  growing = list(lanes)
  while growing:
    for name in list(growing):
      larger = [size for size in lanes[name] if size > rows[name]]
      size = min(larger, default=0)
      others = sum(taken.values()) - taken[name]
      if size and others + lanes[name][size] <= limit:
        rows[name], taken[name] = size, lanes[name][size]
      else:
        growing.remove(name)
  return rows


def say(count: int) -> str:
  """A number of bytes for a reader."""
  return f"{count / 2**20:,.1f} MiB"
