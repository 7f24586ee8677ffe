"""The next batches, made by a thread while the device works on this one."""

import collections
from collections.abc import Callable, Generator, Sequence
from concurrent import futures


def prefetch[T](
  make: Callable[[int], T], steps: Sequence[int], ahead: int = 1
) -> Generator[T, None, None]:
  """Yields make(step) of each step, in order.

  One thread makes them all, one after the other: the calls are those of a plain
  loop, only earlier. What one of them raises comes out here, where its batch
  would have. Close the generator when leaving early (contextlib.closing), so
  that the thread ends with the batch it is at.

  Args:
    make: makes the batch of a step.
    steps: in the order of the loop.
    ahead: batches that may wait to be asked for.
  """
  waiting: collections.deque[futures.Future[T]] = collections.deque()
  with futures.ThreadPoolExecutor(1, "prefetch") as thread:
    try:
      for step in steps:
        waiting.append(thread.submit(make, step))
        if len(waiting) > ahead:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      for future in waiting:
        future.cancel()
