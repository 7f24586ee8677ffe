"""Interpreted kernels against their references, on one set of arguments.

Small whole numbers make every product exact, in any order of summation, and
ties frequent: choices must be equal, not close.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.devices import Device

INTERPRETED = plgpu.InterpretGPUParams(detect_races=True)


def device_of(num_cores: int) -> Device:
  return Device(kind="interpreter", architecture=None, num_cores=num_cores)


def whole_numbers(rng, *shape: int, largest: int = 2) -> jax.Array:
  """bf16 whole numbers from -largest to largest."""
  return jnp.array(rng.integers(-largest, largest + 1, shape), jnp.bfloat16)


def lm_head_verify(
  architecture: str,
  rows: int,
  width: int,
  vocabulary: int,
  *,
  vocab_axis: int = 0,
  cores: int = 3,
  draws: bool = False,
  softcap: float | None = None,
  negative: bool = False,
  asks: bool = True,
) -> None:
  """Compares every statistic; negative logits lie below a missing token's 0."""
  from pallas_kernels.lm_head_verify import api, reference
  from pallas_kernels.lm_head_verify.row_stats import Draws

  rng = np.random.default_rng(rows + vocabulary)
  hidden = whole_numbers(rng, rows, width)
  head = whole_numbers(rng, vocabulary, width)
  if negative:
    hidden, head = -abs(hidden) - 1, abs(head) + 1
  head = head if vocab_axis == 0 else head.T
  tokens = None
  if asks:
    tokens = jnp.array(rng.integers(0, vocabulary, rows), jnp.int32)
  drawing = None
  if draws:
    drawing = Draws(
      seeds=jnp.array(rng.integers(0, 2**32, rows, dtype=np.uint32)),
      moments=jnp.array(rng.integers(0, 9999, rows), jnp.int32),
      temperature=3.0,
      stream=2,
    )
  keywords = dict(vocab_axis=vocab_axis, softcap=softcap)
  want = reference.lm_head_verify(hidden, head, tokens, drawing, **keywords)
  got = api.run_kernel(
    architecture,
    device_of(cores),
    hidden,
    head,
    tokens,
    drawing,
    **keywords,
    interpret=INTERPRETED,
  )
  exact = softcap is None
  for name in ("best", "top", "given", "margin", "logsumexp", "sample"):
    wanted, found = getattr(want, name), getattr(got, name)
    if wanted is None:
      assert found is None
    elif name in ("best", "sample") or (exact and name != "logsumexp"):
      np.testing.assert_array_equal(found, wanted, err_msg=name)
    else:
      np.testing.assert_allclose(found, wanted, 2e-6, 2e-6, err_msg=name)
