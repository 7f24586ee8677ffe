"""fp8_matmul: kernels against the reference, and the reference itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.devices import Device, cache_bytes
from pallas_kernels.fp8_matmul import api, config, fp8_matmul, quantize
from pallas_kernels.fp8_matmul.quantization import E4M3, quantize_rows
from tests.pallas_kernels.interpreter import HANG, SOUND, Job, Mutant, run

CHECK = "tests.pallas_kernels.checks_fp8_matmul:fp8_matmul"
KERNELS = ("sm90", "sm100")

# --- Kernels ------------------------------------------------------------------

# Two tiles of rows, two CTAs for each, three items for each of two steps.
SMALL = dict(
  rows=20,
  width=768,
  features=136,
  cores=4,
  tile_rows=16,
  splits=3,
  stages=3,
)
# One step and fewer items than CTAs; every width of a tile; rows and features
# cut short; as many rows as a tile has, and more; one CTA for all.
SHAPES = (
  dict(rows=1, width=32, features=8),
  dict(rows=1, width=96, features=136, cores=1),
  dict(rows=13, width=576, features=200, cores=2),
  dict(rows=31, width=512, features=264, cores=2),
  dict(rows=37, width=384, features=392, cores=5),
  dict(rows=128, width=256, features=264),
  dict(rows=131, width=128, features=136),
)
TILES = "fp8_matmul/tiles.py"
SHARED_MUTANTS = (
  Mutant(
    "an item more than there are",
    TILES,
    "self.tiles * self.config.splits - 1 - cta",
    "self.tiles * self.config.splits + self.ctas - 1 - cta",
  ),
  Mutant(
    "items taken by several CTAs",
    TILES,
    "item = cta + index * self.ctas",
    "item = cta + index",
  ),
  Mutant(
    "splits overlap",
    TILES,
    "pl.ds((split * self.steps + step) * size, size)",
    "pl.ds((split + step) * size, size)",
  ),
  Mutant(
    "every tile of rows is the first",
    TILES,
    "return self.rows(row_tile), self._width(split, step)",
    "return self.rows(0 * row_tile), self._width(split, step)",
  ),
  Mutant(
    "only the first split",
    "fp8_matmul/api.py",
    "parts.sum(axis=0)",
    "parts[0]",
  ),
)
SM90, SM100 = "fp8_matmul/kernel_sm90.py", "fp8_matmul/kernel_sm100.py"
MUTANTS = {
  "sm90": (
    *SHARED_MUTANTS,
    Mutant(
      "multiplies before the tiles have come",
      SM90,
      "plgpu.barrier_wait(loaded.at[slot])",
      "None",
    ),
    Mutant(
      "loads over tiles in use",
      SM90,
      "plgpu.barrier_wait(consumed.at[slot])",
      "None",
    ),
    Mutant(
      "a tile is ready when half of it is",
      SM90,
      "Barrier(num_arrivals=2, num_barriers=stages)",
      "Barrier(num_arrivals=1, num_barriers=stages)",
    ),
    Mutant(
      "waits for a consumer too many",
      SM90,
      "num_arrivals=GROUPS,",
      "num_arrivals=GROUPS + 1,",
    ),
    Mutant(
      "never says that a tile is free",
      SM90,
      "plgpu.barrier_arrive(consumed.at[slot])",
      "None",
    ),
    Mutant(
      "says that a tile is free before it is",
      SM90,
      "plgpu.barrier_wait(loaded.at[slot])",
      "plgpu.barrier_wait(loaded.at[slot]); "
      "plgpu.barrier_arrive(consumed.at[slot])",
    ),
    Mutant(
      "leaves before its loads are seen",
      SM90,
      "lax.fori_loop(lax.max(count - stages, 0), count, drain, None)",
      "None",
    ),
    Mutant("forgets earlier steps", SM90, "return total + part", "return part"),
    Mutant(
      "both groups take the same features",
      SM90,
      "first = group * GROUP_FEATURES",
      "first = group * 0",
    ),
    Mutant(
      "the ring starts anew at each item",
      SM90,
      "slot = lax.rem(index * steps + step, stages)",
      "slot = lax.rem(step, stages)",
    ),
  ),
  "sm100": (
    *SHARED_MUTANTS,
    Mutant(
      "multiplies before the tiles have come",
      SM100,
      "plgpu.barrier_wait(loaded.at[slot])",
      "None",
    ),
    Mutant(
      "loads over tiles in use",
      SM100,
      "plgpu.barrier_wait(consumed.at[slot])",
      "None",
    ),
    Mutant(
      "multiplies over what is being written out",
      SM100,
      "plgpu.barrier_wait(free.at[buffer])",
      "None",
    ),
    Mutant(
      "writes out what is being multiplied",
      SM100,
      "plgpu.barrier_wait(done.at[lax.rem(index, BUFFERS)])",
      "None",
    ),
    Mutant(
      "never says that an item is done",
      SM100,
      "plgpu.tcgen05_commit_arrive(done.at[buffer])",
      "None",
    ),
    Mutant(
      "never says that an accumulator is free",
      SM100,
      "plgpu.barrier_arrive(free.at[lax.rem(index, BUFFERS)])",
      "None",
    ),
    Mutant(
      "frees an accumulator before it is read",
      SM100,
      "plgpu.wait_load_tmem()",
      "None",
    ),
    Mutant(
      "adds to what the accumulator held",
      SM100,
      "accumulate=step > 0",
      "accumulate=True",
    ),
    Mutant(
      "forgets earlier steps", SM100, "accumulate=step > 0", "accumulate=False"
    ),
    Mutant(
      "one accumulator for all",
      SM100,
      "start = lax.rem(index, BUFFERS) * columns + first",
      "start = first",
    ),
    Mutant(
      "a tile is ready when half of it is",
      SM100,
      "Barrier(num_arrivals=2, num_barriers=stages)",
      "Barrier(num_arrivals=1, num_barriers=stages)",
    ),
    Mutant(
      "rows of all tiles in one place",
      SM100,
      "first = row_tile * config.rows + first",
      "first = row_tile * 0 + first",
    ),
    Mutant(
      "leaves before its accumulators are free",
      SM100,
      "drain(free, num_items, BUFFERS)",
      "None",
    ),
  ),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted_kernels_compute_the_product(kernel):
  assert run([Job(CHECK, SMALL | dict(architecture=kernel))], 300) == [SOUND]


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted_kernels_at_every_shape(kernel):
  jobs = [Job(CHECK, shape | dict(architecture=kernel)) for shape in SHAPES]
  assert run(jobs, timeout=300) == [SOUND] * len(jobs)


@pytest.mark.kernels
@pytest.mark.parametrize("kernel", KERNELS)
def test_planted_bugs_are_found(kernel):
  arguments = SMALL | dict(architecture=kernel)
  mutants = MUTANTS[kernel]
  verdicts = run([Job(CHECK, arguments, m) for m in mutants], timeout=15)
  found = dict(zip([m.name for m in mutants], verdicts, strict=True))
  assert not [name for name, verdict in found.items() if verdict == SOUND]
  stuck = {
    "sm90": "never says that a tile is free",
    "sm100": "never says that an item is done",
  }
  assert found[stuck[kernel]] == HANG


# --- The reference ------------------------------------------------------------


def test_the_product_of_whole_numbers_is_exact():
  rng = np.random.default_rng(0)
  x = rng.integers(-4, 5, (7, 40)).astype(np.float32)
  x[:, 0] = 7  # 448 / 64, so scales are powers of 2
  kernel = rng.integers(-4, 5, (40, 13)).astype(np.float32)
  kernel[0] = 7
  weight, scale = quantize(jnp.array(kernel))
  np.testing.assert_array_equal(scale, np.full(13, 1 / 64, np.float32))
  np.testing.assert_array_equal(fp8_matmul(x, weight, scale), x @ kernel)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_is_near_that_of_real_numbers(dtype):
  rng = np.random.default_rng(1)
  x = jnp.array(rng.normal(size=(5, 300)), dtype)
  kernel = rng.normal(size=(300, 17)) * np.exp(rng.normal(size=17))
  weight, scale = quantize(jnp.array(kernel, jnp.float32))
  got = np.asarray(fp8_matmul(x, weight, scale), np.float64)
  x = np.asarray(x, np.float64)
  error = np.abs(got - x @ kernel)
  # Half a step of a normal number, or of a subnormal one.
  x_error = np.maximum(
    np.abs(x) / 16, np.abs(x).max(1, keepdims=True) / 448 / 1024
  )
  kernel_error = np.maximum(np.abs(kernel) / 16, np.asarray(scale) / 1024)
  bound = x_error @ np.abs(kernel) + np.abs(x) @ kernel_error
  bound = (bound + x_error @ kernel_error) * 1.001
  assert (error <= bound).all()
  assert np.linalg.norm(error) < 0.05 * np.linalg.norm(x @ kernel)


def test_quantised_rows_fill_the_range():
  rows = jnp.array([[0.0, 0.0], [1e-30, -2e-30], [3.0, -1.5], [-7e30, 1e30]])
  quantised, scale = quantize_rows(rows)
  assert quantised.dtype == E4M3 and scale.dtype == jnp.float32
  wide = np.asarray(quantised, np.float32)
  np.testing.assert_array_equal(np.abs(wide).max(1), [0, 448, 448, 448])
  np.testing.assert_allclose(wide * scale[:, None], rows, rtol=2**-4)


def test_a_row_does_not_depend_on_the_others():
  rng = np.random.default_rng(2)
  x = jnp.array(rng.normal(size=(9, 64)), jnp.float32)
  weight, scale = quantize(jnp.array(rng.normal(size=(64, 24)), jnp.float32))
  many = jax.vmap(lambda row: fp8_matmul(row[None], weight, scale)[0])(x)
  np.testing.assert_allclose(fp8_matmul(x, weight, scale), many, 1e-5, 1e-5)


# --- How it is cut ------------------------------------------------------------


@pytest.mark.parametrize("architecture", KERNELS)
@pytest.mark.parametrize(
  ("features", "width"),
  [(12288, 4096), (4096, 12288), (6144, 4096), (1536, 576), (8, 32)],
)
def test_splits_do_not_depend_on_rows(architecture, features, width):
  choose = functools.partial(
    config.choose_config,
    architecture,
    features=features,
    width=width,
    num_cores=132,
  )
  chosen = [choose(rows) for rows in (1, 9, 33, 128, 500)]
  assert len({c.splits for c in chosen}) == 1
  assert [c.rows for c in chosen] == (
    [8, 16, 40, 128, 128] if architecture == "sm90" else [16, 16, 48, 128, 128]
  )
  for c in chosen:
    assert width % (c.tile_width * c.splits) == 0
    stage = (config.TILE_FEATURES + c.rows) * c.tile_width
    assert c.stages > 3 and c.stages * stage <= config.RING_BYTES


def test_splits_keep_cores_busy():
  assert config.choose_splits(4096, 32, num_cores=132) == 4  # 128 items
  assert config.choose_splits(128 * 132, 32, num_cores=132) == 1
  assert config.choose_splits(128, 32, num_cores=132) > 8


def test_small_drafters_fit_in_cache_and_large_ones_do_not():
  layer = [(576, 960), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
  assert config.resident_bytes((576, 1536)) == 576 * 1536 + 4 * 1536
  assert config.resident_bytes(*layer * 8) < cache_bytes(
    "NVIDIA H100 80GB HBM3"
  )
  large = [(4096, 12288), (4096, 12288), (12288, 4096)]
  assert config.resident_bytes(*large) > cache_bytes("NVIDIA B200")


# --- What is refused ----------------------------------------------------------

X = jnp.ones((3, 32))
WEIGHT, SCALE = quantize(jnp.ones((32, 16)))


@pytest.mark.parametrize(
  ("x", "weight", "scale", "message"),
  [
    (X[0], WEIGHT, SCALE, "must have 2 axes"),
    (X[:, :16], WEIGHT, SCALE, "differ in width"),
    (X[:0], WEIGHT, SCALE, "is empty"),
    (X, WEIGHT[:0], SCALE[:0], "is empty"),
    (X.astype(jnp.int32), WEIGHT, SCALE, "x is int32"),
    (X, WEIGHT.astype(jnp.bfloat16), SCALE, "make it with `quantize`"),
    (X, WEIGHT, SCALE[:8], "must have an entry per row"),
    (X, WEIGHT, SCALE.astype(jnp.bfloat16), "scale is bfloat16; use float32"),
  ],
)
def test_what_nobody_could_compute_is_refused(x, weight, scale, message):
  with pytest.raises(ValueError) as refused:
    fp8_matmul(x, weight, scale)
  assert message in str(refused.value)


def test_kernels_need_their_device():
  for implementation in KERNELS:
    with pytest.raises(NotImplementedError, match="cannot run on cpu"):
      fp8_matmul(X, WEIGHT, SCALE, implementation=implementation)


def test_a_limit_met_on_a_gpu_is_told_or_worked_around(monkeypatch):
  hopper = Device("a GPU", "sm90", 132)
  monkeypatch.setattr(Device, "current", lambda: hopper)
  odd = quantize(jnp.ones((32, 12)))
  with pytest.raises(NotImplementedError, match="8 n times 32 m, not 12 x 32"):
    fp8_matmul(X, *odd, implementation="sm90")
  np.testing.assert_allclose(fp8_matmul(X, *odd), 32.0, rtol=1e-6)
  assert api._kernel_limit(WEIGHT) is None
  assert "not 16 x 48" in api._kernel_limit(jnp.ones((16, 48), E4M3))
