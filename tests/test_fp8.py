"""Kernels in 8 bits against numpy in float64, and bugs that must show."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import smollm2_135m
from dflash_jax import fp8, layers
from dflash_jax.config import DraftConfig
from dflash_jax.fp8 import DecodedKernel, Fp8Kernel
from dflash_jax.generate import generate
from dflash_jax.model import load
from dflash_jax.prompts import read_prompts
from pallas_kernels.devices import Device
from train.export import convert

E4M3 = ml_dtypes.float8_e4m3fn


def draw_kernel(D, F):
  """A kernel whose channels differ in size by a factor of a million."""
  sizes = np.exp(np.linspace(-7, 7, F))
  kernel = np.random.default_rng(D + F).normal(size=(D, F)) * sizes
  return kernel.astype(np.float32)


def draw_rows(M, D):
  """Rows whose largest entry is 7 times a power of 2, so scales are exact."""
  rng = np.random.default_rng(M)
  rows = rng.uniform(-6, 6, (M, D)) * 2.0 ** np.arange(M)[:, None]
  rows[:, 3] = -7 * 2.0 ** np.arange(M)
  return rows.astype(np.float32)


def wide(values):
  """Any array in float64."""
  return np.asarray(values).astype(np.float64)


def true_product(x, values, scale):
  """The product of rounded rows and e4m3 values[F, D], in float64."""
  row_scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
  rows = (x / row_scale).astype(E4M3)
  return wide(rows) * row_scale @ wide(values).T * wide(scale)


def worst_channel(kernel: Fp8Kernel, true: np.ndarray) -> float:
  """The largest error of a channel of a product, as part of its size."""
  x = np.random.default_rng(5).normal(size=(61, true.shape[0]))
  expected = wide(x) @ wide(true)
  y = jax.jit(layers.matmul)(x.astype(np.float32), kernel)
  error = wide(y) - expected
  sizes = np.linalg.norm(expected, axis=0)
  return (np.linalg.norm(error, axis=0) / sizes).max()


# --- Quantisation -------------------------------------------------------------


def test_values_and_scales_are_those_of_numpy():
  kernel = draw_kernel(37, 23)
  found = Fp8Kernel.quantize(jnp.asarray(kernel))
  scale = np.asarray(found.scale)
  np.testing.assert_allclose(scale, np.abs(kernel).max(0) / 448, rtol=1e-6)
  quotient = np.clip(kernel.T / scale[:, None], -448, 448)
  assert found.values.dtype == E4M3 and found.scale.dtype == np.float32
  np.testing.assert_array_equal(found.values, quotient.astype(E4M3))
  assert found.shape == kernel.shape


def test_rounding_to_8_bits_is_to_the_nearest_and_ties_to_even():
  """Between any two neighbours of e4m3, as ml_dtypes rounds."""
  codes = np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
  ties = (codes[1:] + codes[:-1]) / 2
  near = [np.nextafter(ties, np.float32(side)) for side in (0, 449)]
  numbers = np.concatenate([codes, ties, *near])
  numbers = np.concatenate([numbers, -numbers])
  rounded = jax.jit(lambda x: x.astype(jnp.float8_e4m3fn))(numbers)
  np.testing.assert_array_equal(rounded, numbers.astype(E4M3))


def test_a_channel_of_zeros_stays_zero():
  kernel = draw_kernel(37, 23)
  kernel[:, 2] = 0
  found = Fp8Kernel.quantize(jnp.asarray(kernel))
  rows = draw_rows(6, 37)
  rows[4] = 0
  y = np.asarray(jax.jit(layers.matmul)(rows, found))
  assert np.isfinite(y).all() and not y[:, 2].any() and not y[4].any()


def square_bugs(kernel):
  """Mistakes that a square kernel, whose axes no shape tells apart, allows."""
  sound = Fp8Kernel.quantize(jnp.asarray(kernel))
  wrong_axis = jnp.asarray(np.abs(kernel).max(axis=1) / 448)
  one = jnp.full_like(sound.scale, np.abs(kernel).max() / 448)

  def divided(scale):
    return jnp.asarray(kernel.T / np.asarray(scale)[:, None]).astype(E4M3)

  return {
    "sound": sound,
    "scale of the wrong axis": Fp8Kernel(sound.values, wrong_axis),
    "scale forgotten": Fp8Kernel(sound.values, jnp.ones_like(sound.scale)),
    "one scale for all channels": Fp8Kernel(divided(one), one),
    "values transposed": Fp8Kernel(sound.values.T, sound.scale),
  }


def test_planted_bugs_are_found():
  kernel = draw_kernel(29, 29)
  worst = {
    name: worst_channel(found, kernel)
    for name, found in square_bugs(kernel).items()
  }
  assert worst.pop("sound") < 0.06
  assert min(worst.values()) > 0.5, worst


# --- Products -----------------------------------------------------------------


@pytest.mark.parametrize("form", ["stored", "decoded"])
def test_the_product_is_that_of_float64(form):
  kernel = Fp8Kernel.quantize(jnp.asarray(draw_kernel(37, 23)))
  x = draw_rows(6, 37)
  expected = true_product(x, kernel.values, kernel.scale)
  used = kernel if form == "stored" else kernel.decode()
  y = jax.jit(layers.matmul)(x.reshape(2, 3, 37), used)
  assert y.shape == (2, 3, 23) and y.dtype == jnp.float32
  size = np.abs(expected).max(axis=0)
  error = np.abs(wide(y).reshape(6, 23) - expected)
  assert (error < 1e-5 * size).all()


def test_a_layer_takes_a_kernel_in_8_bits():
  from flax import nnx

  linear = layers.Linear(37, 23, rngs=nnx.Rngs(0), bias=True)
  x = jnp.asarray(draw_rows(5, 37))
  definition, state = nnx.split(linear)
  params = nnx.to_pure_dict(state)
  params["bias"] = jnp.arange(23.0)
  kernel = Fp8Kernel.quantize(params["kernel"])
  quantized = nnx.merge(definition, nnx.State(params | {"kernel": kernel}))
  y = jax.jit(lambda x: quantized(x))(x)
  product = jax.jit(layers.matmul)(x, kernel)
  np.testing.assert_allclose(y, product + params["bias"], 1e-5, 1e-5)
  whole = nnx.merge(definition, nnx.State(params))(x)
  distance = np.linalg.norm(y - whole) / np.linalg.norm(whole)
  assert 1e-3 < distance < 0.1


# --- Devices ------------------------------------------------------------------


def test_kernels_are_decoded_where_no_device_kernel_takes_them(monkeypatch):
  kernel = Fp8Kernel.quantize(jnp.asarray(draw_kernel(37, 23)))
  params = {"layers": {0: {"kernel": kernel}}, "scale": jnp.ones(3)}
  here = fp8.for_device(params)
  decoded = here["layers"][0]["kernel"]
  assert isinstance(decoded, DecodedKernel)
  np.testing.assert_array_equal(decoded.values, wide(kernel.values).T)
  assert here["scale"] is params["scale"]
  hopper = Device("a GPU", "sm90", 132)
  monkeypatch.setattr(Device, "current", lambda: hopper)
  assert fp8.for_device(params) is params


def test_bytes_are_those_of_8_bits_in_either_form():
  kernel = Fp8Kernel.quantize(jnp.asarray(draw_kernel(37, 23)))
  for form in (kernel, kernel.decode()):
    params = {"kernel": form, "norm": jnp.ones(11)}
    assert fp8.stored_bytes(params, "bfloat16") == 37 * 23 + 4 * 23 + 2 * 11
  whole = {"kernel": jnp.zeros((37, 23))}
  assert fp8.stored_bytes(whole, "bfloat16") == 2 * 37 * 23


# --- The shipped drafter ------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_drafter_drafts_as_well_in_8_bits(tmp_path):
  source = smollm2_135m.get_config().drafter.path
  exported = convert(source, str(tmp_path / "d"), quantize="fp8")
  # Kernels halve; the selector's tables, a row per token, stay.
  assert exported.weight_bytes < 0.58 * exported.whole_bytes
  model = load(smollm2_135m.get_config())
  small = model.with_drafter(DraftConfig(path=str(tmp_path / "d")))
  prompts = read_prompts("eval/prompts/chat.jsonl", 20)
  tau, replies = [], []
  for each in (model, small, model.without_drafter()):
    width = "fixed:7" if each.drafter.max_drafts else ""
    decode = dataclasses.replace(each.config.decode, width=width)
    config = dataclasses.replace(each.config, decode=decode)
    found = generate(
      dataclasses.replace(each, config=config), prompts, max_new_tokens=96
    )
    replies.append([reply.tokens for reply in found])
    rounds = sum(reply.rounds for reply in found)
    tau.append(sum(len(reply.tokens) - 1 for reply in found) / rounds)
  assert replies[0] == replies[1] == replies[2]
  assert tau[1] > 0.98 * tau[0], tau
