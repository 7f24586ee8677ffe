"""fp8_matmul: interpreted kernels against plain XLA."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from tests.pallas_kernels.checks import INTERPRETED, device_of


def fp8_matmul(
  architecture: str,
  rows: int,
  width: int,
  features: int,
  *,
  cores: int = 3,
  tile_rows: int | None = None,
  splits: int | None = None,
  stages: int | None = None,
) -> None:
  """Compares results that are exact: sums of whole numbers.

  Args:
    architecture: of the kernel.
    rows, width, features: M, D, F.
    cores: of the device.
    tile_rows, splits, stages: in place of the configuration's own.
  """
  from pallas_kernels.fp8_matmul import api, reference
  from pallas_kernels.fp8_matmul.config import choose_config
  from pallas_kernels.fp8_matmul.quantization import E4M3

  rng = np.random.default_rng(rows + width + features)
  x = rng.integers(-2, 3, (rows, width)).astype(np.float32)
  x[:, 0] = 2  # the scale of every row is 2 / 448
  weight = jnp.array(rng.integers(-4, 5, (features, width)), jnp.float32)
  scale = jnp.array(rng.uniform(0.5, 2, features), jnp.float32)
  operands = jnp.array(x, jnp.bfloat16), weight.astype(E4M3), scale
  config = choose_config(architecture, rows, features, width, cores)
  changes = dict(rows=tile_rows, splits=splits, stages=stages)
  config = dataclasses.replace(
    config, **{name: value for name, value in changes.items() if value}
  )
  got = api.run_kernel(
    architecture,
    device_of(cores),
    *operands,
    config=config,
    interpret=INTERPRETED,
  )
  want = reference.fp8_matmul(*operands)
  np.testing.assert_array_equal(got, want)
