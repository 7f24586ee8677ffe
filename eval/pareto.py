"""Throughput per device against tokens/s per user, and where ratios end.

At an interactivity that plain decoding barely reaches its throughput falls off
a cliff, and a ratio taken there, or beyond, can be anything. So a ratio is of
throughputs at one interactivity, and there is none where plain decoding has no
point at or above it.
"""

from collections.abc import Sequence
from typing import Any

# (tokens/s per user, tokens/s per device)
Place = tuple[float, float]


def places(points: Sequence[dict[str, Any]], mode: str) -> list[Place]:
  """Of one mode, by number of requests in flight."""
  mine = [point for point in points if point["mode"] == mode]
  mine.sort(key=lambda point: point["concurrency"])
  return [(p["user_tokens_per_s"], p["device_tokens_per_s"]) for p in mine]


def reach(curve: Sequence[Place]) -> float:
  """The highest interactivity of a curve; 0 of an empty one."""
  return max((user for user, _ in curve), default=0.0)


def throughput_at(curve: Sequence[Place], user: float) -> float | None:
  """The most tokens/s per device at this interactivity or a higher one.

  Args:
    curve: by number of requests in flight; straight between its points.
    user: tokens/s per user.

  Returns:
    None where the curve does not reach it.
  """
  found = [device for rate, device in curve if rate >= user]
  for (a, high), (b, low) in zip(curve, curve[1:], strict=False):
    if min(a, b) < user < max(a, b):
      found.append(high + (low - high) * (user - a) / (b - a))
  return max(found, default=None)


def ratio_at(curve: Sequence[Place], place: Place) -> float | None:
  """A point's throughput over a curve's at its interactivity, if it has one."""
  user, device = place
  base = throughput_at(curve, user)
  return device / base if base else None
