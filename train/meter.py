"""How fast a run is: slots a second, share of the device's peak, memory.

MFU (model FLOPs utilisation; PaLM, arXiv 2204.02311, appendix B) counts what
the mathematics of an update asks for, not what is done again to save memory.
Here that is every matrix product in the update's own program, traced without
rematerialisation: the target's pass for online features included, optimiser and
everything that is no matrix product left out. XLA's cost analysis is no help:
it counts a loop's body once, whatever its length.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from dflash_jax.drafters import Borrowed
from dflash_jax.target import Params
from train.state import Batch, TrainState
from train.step import Trainer

# Dense bfloat16 products a second, summed in float32; the first name that is in
# the device's kind counts. Sources: NVIDIA's data sheets of H100, H200, A100,
# HGX B200 and GB200, which print twice as much, for sparse operands; Google's
# documents of each TPU. A device not named has no MFU.
PEAK_FLOPS = {
  "H100 PCIe": 756e12,
  "H100 NVL": 835e12,
  "H100": 989e12,
  "H200 NVL": 835e12,
  "H200": 989e12,
  "GB200": 2500e12,
  "B200": 2250e12,
  "A100": 312e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}


def peak_flops(kind: str, dtype: str) -> float | None:
  """Of a device kind, as JAX names it; None where nobody says, or in float32.

  Float32 products run at another peak on each device, and at full precision at
  another still.
  """
  if dtype != "bfloat16":
    return None
  return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def count_flops(function: Callable[..., Any], *arguments: Any) -> int:
  """Floating-point operations of the matrix products in function(*arguments).

  A product of [M, K] and [K, N] is 2 M N K. Loops count as often as they run,
  except those of unknown length, which count once; of branches, the dearest.
  Kernels written by hand are not looked into.
  """
  jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
  # Products that nobody asks for are traced too, such as gradients of a frozen
  # head; compilers leave them out.
  return _count(partial_eval.dce_jaxpr(jaxpr, True)[0])


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(map(_count_equation, jaxpr.eqns))


def _count_equation(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    operand: Any = equation.invars[0].aval
    result: Any = equation.outvars[0].aval
    (contracted, _), _ = params["dimension_numbers"]
    depth = math.prod(operand.shape[axis] for axis in contracted)
    return 2 * depth * math.prod(result.shape)
  if name == "pallas_call":
    return 0
  inner = [_count(jaxpr) for jaxpr in core.jaxprs_in_params(params)]
  if name == "cond":
    return max(inner)
  return sum(inner) * (params["length"] if name == "scan" else 1)


def update_flops(
  trainer: Trainer,
  state: TrainState,
  target_params: Params,
  borrowed: Borrowed,
  batch: Batch,
) -> int:
  """Of one update of the whole batch, by all devices together.

  Traced in one piece, on one device, so that nothing is computed twice.
  """
  whole = dataclasses.replace(
    trainer.config,
    anchor_chunk=0,
    loss_chunk=2**30,
    accumulate=1,
    fused_attention=False,  # whose products nobody could count
  )
  lone = Trainer.create(trainer.target, trainer.drafter, whole)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
    (state, target_params, borrowed, batch),
  )
  return count_flops(lone.gradients, *shapes)


class Meter:
  """The pace of updates between two readings.

  Attributes:
    flops: of an update, all devices together.
    peak: of all devices together, or None.
  """

  def __init__(self, flops: int, dtype: str):
    """Of updates of so many `flops` whose products are of `dtype`."""
    self.flops = flops
    one = peak_flops(jax.devices()[0].device_kind, dtype)
    self.peak = one and one * jax.device_count()
    self._last: Any = None
    self.restart()

  def restart(self) -> None:
    """Begins to count anew; called after what is no update."""
    self._steps, self._clock = 0, time.perf_counter()

  def follow(self, result: Any) -> None:
    """Takes note of an update that was just dispatched.

    Waits for the one before it, so that no more than two batches are alive on
    the device. The first is waited for and not counted: it compiles.
    """
    if self._last is None:
      jax.block_until_ready(result)
      self.restart()
    else:
      jax.block_until_ready(self._last)
      self._steps += 1
    self._last = result

  def read(self, slots: float) -> dict[str, float]:
    """What to log of the updates since the last reading, all of them done.

    Args:
      slots: supervised in an update, on average.

    Returns:
      slots_per_s, flops_per_s, mfu where the peak is known, and where it can be
      said peak_memory_bytes of the first device; nothing before there are two.
    """
    seconds, steps = time.perf_counter() - self._clock, self._steps
    self.restart()
    if not steps:
      return {}
    pace = steps / seconds
    values = {"slots_per_s": slots * pace, "flops_per_s": self.flops * pace}
    if self.peak:
      values["mfu"] = self.flops * pace / self.peak
    memory = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in memory:
      values["peak_memory_bytes"] = memory["peak_bytes_in_use"]
    return values
