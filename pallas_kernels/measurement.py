"""One case measured in every implementation: right first, then how fast."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import devices, timing
from pallas_kernels.cases import Case, array
from pallas_kernels.devices import Device

TOO_FAST = 1.5  # share of the copy bandwidth that memory cannot deliver
NO_MEMORY = "does not fit into memory"
# Bytes of the narrowest operand's numbers -> error allowed, relative to the
# norm; a single element may be off by ten times that of the largest.
TOLERANCES = {1: 2e-2, 2: 1e-2, 4: 1e-4}
MAX_TIES = 1 / 64  # share of whole numbers that may differ: choices at ties
HEADING = (
  f"{'case':54} {'':5} {'us':>10} {'GB/s':>7} {'of copy':>7} {'TFLOP/s':>7} "
  f"{'x xla':>7}"
)


class WrongError(Exception):
  """A result that is not the reference's."""


@dataclasses.dataclass(frozen=True)
class Machine:
  """What rows are measured on.

  Attributes:
    kind: of the device.
    cache_bytes: of its L2.
    dispatch_seconds: of a dispatch that does next to nothing.
    copy_bytes_per_s: read plus written.
  """

  kind: str
  cache_bytes: int
  dispatch_seconds: float
  copy_bytes_per_s: float

  @classmethod
  def measure(cls, copied_bytes: int) -> "Machine":
    """The default device. A negation is timed: a mere copy may be elided."""
    kind = Device.current().kind
    machine = cls(kind, devices.cache_bytes(kind), timing.dispatch_seconds(), 1)
    operands = (array(copied_bytes // 4, dtype=jnp.float32),)
    copies = timing.make_copies(operands, timing.MIN_COPIES)
    seconds, _ = time_calls(jnp.negative, copies, machine, lambda _: "")
    return dataclasses.replace(
      machine, copy_bytes_per_s=2 * copied_bytes / seconds
    )


@dataclasses.dataclass(frozen=True)
class Row:
  """One implementation of one case.

  Attributes:
    case, implementation: names.
    seconds: per call; None if there is no time.
    bytes_per_s, flops_per_s: of what the case needs, not of what was done.
    share_of_copy: bytes_per_s as a part of a copy's.
    speedup: over xla; None if that was not timed.
    copies, calls: of the operands that took turns, and per dispatch.
    problem: why there is no time, or none to trust.
  """

  case: str
  implementation: str
  seconds: float | None = None
  bytes_per_s: float = 0.0
  share_of_copy: float = 0.0
  flops_per_s: float = 0.0
  speedup: float | None = None
  copies: int = 0
  calls: int = 0
  problem: str = ""

  def __str__(self) -> str:
    """A line of the table."""
    start = f"{self.case:54} {self.implementation:5}"
    if self.seconds is None:
      return f"{start} {self.problem}"
    speedup = "" if self.speedup is None else f"{self.speedup:.2f}x"
    line = (
      f"{start} {self.seconds * 1e6:10.1f} {self.bytes_per_s / 1e9:7.0f} "
      f"{self.share_of_copy:7.1%} {self.flops_per_s / 1e12:7.1f} {speedup:>7}"
    )
    return f"{line}  {self.problem}".rstrip()


def measure(
  case: Case, implementations: Sequence[str], machine: Machine
) -> Iterator[Row]:
  """A row for each implementation, in their order; none may end the others."""
  count = timing.num_copies(case.operands, machine.cache_bytes)
  try:
    copies = timing.make_copies(case.operands, count)
    wanted = jax.device_get(jax.jit(_call(case, "xla"))(*copies[0]))
  except Exception as error:
    for name in implementations:
      yield Row(case.name, name, problem=f"no reference: {_describe(error)}")
    return
  check = functools.partial(difference, wanted=wanted, case=case)
  xla_seconds = None
  for name in implementations:
    try:
      call = _call(case, name)
      seconds, calls = time_calls(call, copies, machine, check)
    except Exception as error:
      yield Row(case.name, name, problem=_describe(error))
      continue
    xla_seconds = seconds if name == "xla" else xla_seconds
    share = case.bytes / seconds / machine.copy_bytes_per_s
    problem = "faster than memory" if share > TOO_FAST else ""
    if timing.total_bytes(case.operands) * count <= machine.cache_bytes:
      problem = "operands stay in the cache"
    yield Row(
      case=case.name,
      implementation=name,
      seconds=seconds,
      bytes_per_s=case.bytes / seconds,
      share_of_copy=share,
      flops_per_s=case.flops / seconds,
      speedup=xla_seconds / seconds if xla_seconds else None,
      copies=count,
      calls=calls,
      problem=problem,
    )


def time_calls(
  call: Callable[..., Any],
  copies: list[Any],
  machine: Machine,
  check: Callable[[Any], str],
) -> tuple[float, int]:
  """Seconds per call, and how many calls a dispatch made.

  Args:
    call: of the operands of one copy.
    copies: that take turns.
    machine: it runs on.
    check: of a result: what is wrong with it, "" for nothing.

  Raises:
    WrongError: a result, alone or in the loop, is wrong; nothing is timed.
  """

  def require(result: Any) -> None:
    if problem := check(result):
      raise WrongError(problem)

  once = jax.jit(call)
  require(once(*copies[0]))
  alone = timing.clock(lambda: once(*copies[0])) - machine.dispatch_seconds
  rounds = timing.choose_rounds(alone, len(copies))
  run = timing.repeat(call, rounds)
  for result in run(copies):
    require(result)
  calls = rounds * len(copies)
  return timing.median_seconds(lambda: run(copies)) / calls, calls


def difference(found: Any, wanted: Any, case: Case) -> str:
  """How a result differs from the reference by more than rounding; or ""."""
  widths = [
    operand.dtype.itemsize
    for operand in jax.tree.leaves(case.operands)
    if jnp.issubdtype(operand.dtype, jnp.floating)
  ]
  tolerance = TOLERANCES[min(widths, default=4)]
  leaves = jax.tree.leaves_with_path(found)
  for (path, x), y in zip(leaves, jax.tree.leaves(wanted), strict=True):
    x = np.asarray(x)
    if problem := _difference(x, y, tolerance):
      return f"wrong result{jax.tree_util.keystr(path)}: {problem}"
  return ""


def _difference(x: np.ndarray, y: np.ndarray, tolerance: float) -> str:
  if x.shape != y.shape or x.dtype != y.dtype:
    return f"{x.dtype}{x.shape}, not {y.dtype}{y.shape}"
  if not jnp.issubdtype(y.dtype, jnp.floating):
    count = int((x != y).sum())
    return f"{count} of {y.size} differ" if count > y.size * MAX_TIES else ""
  error, size = np.abs(np.float64(x) - np.float64(y)), np.abs(np.float64(y))
  norm = np.linalg.norm(error) / max(np.linalg.norm(size), 1e-30)
  worst = error.max(initial=0) / max(size.max(initial=0), 1e-30)
  if norm <= tolerance and worst <= 10 * tolerance:  # a NaN is not
    return ""
  return f"off by {norm:.1e} in norm, {worst:.1e} at most"


def _call(case: Case, implementation: str) -> Callable[..., Any]:
  return functools.partial(case.call, implementation=implementation)


def _describe(error: Exception) -> str:
  text = str(error).strip().partition("\n")[0]
  if isinstance(error, WrongError):
    return text
  if "RESOURCE_EXHAUSTED" in text:
    return NO_MEMORY
  return f"{type(error).__name__}: {text}"
