"""Experts in 4 bits: decoded as the standard says, and damage is named."""

import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dflash_jax import weights
from dflash_jax.weights import mxfp4
from dflash_jax.weights.names import WeightsError

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens/targets/gpt_oss_mxfp4"
EXPERTS = "model.layers.0.mlp.experts."


def number(code):
  """e2m1, from its bits."""
  sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
  size = (
    2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
  )
  return -size if sign else size


def decode_by_hand(blocks, scales):
  """One number at a time, by ml_dtypes' and this file's reading of bits."""
  values = []
  for block, scale in zip(
    blocks.reshape(-1, 16), scales.reshape(-1), strict=True
  ):
    for byte in block:
      for code in (int(byte) % 16, int(byte) // 16):
        assert number(code) == float(
          np.array(code, np.uint8).view(ml_dtypes.float4_e2m1fn)
        )
        values.append(number(code) * 2.0 ** (int(scale) - 127))
  return np.array(values).reshape(*scales.shape[:-1], -1)


def test_every_byte_and_every_usable_scale_decodes_exactly():
  blocks = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
  for scale in (0, 1, 2, 64, 126, 127, 128, 251, 252):
    scales = np.full((16, 1), scale, np.uint8)
    found = mxfp4.decode(blocks, scales)
    assert found.dtype == ml_dtypes.bfloat16
    want = decode_by_hand(blocks, scales)
    np.testing.assert_array_equal(found.astype(np.float64), want)


def test_blocks_have_scales_of_their_own():
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, 256, (3, 5, 2, 16), np.uint8)
  scales = rng.integers(110, 130, (3, 5, 2), np.uint8)
  want = decode_by_hand(blocks, scales)
  assert want.shape == (3, 5, 64)
  np.testing.assert_array_equal(
    mxfp4.decode(blocks, scales).astype(np.float64), want
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matrices_are_those_that_transformers_decodes(dtype):
  _, params = weights.load_target(str(GOLDEN), dtype)
  golden = safetensors.numpy.load_file(GOLDEN / "golden.safetensors")
  mlp = params["layers"][0]["mlp"]
  both = golden["experts.gate_up_proj"]
  for name, want in {
    "gate": both[..., 0::2],
    "up": both[..., 1::2],
    "down": golden["experts.down_proj"],
  }.items():
    found = np.asarray(mlp[name]["kernel"])
    assert found.dtype.name == dtype
    np.testing.assert_array_equal(found, want.astype(dtype))


@pytest.fixture
def checkpoint(tmp_path):
  """A copy of the golden checkpoint, and its tensors."""
  directory = tmp_path / "gpt_oss"
  shutil.copytree(GOLDEN, directory)
  tensors = safetensors.numpy.load_file(directory / "model.safetensors")
  return directory, tensors


def refused(directory, tensors, *named):
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  with pytest.raises(WeightsError) as caught:
    weights.load_target(str(directory))
  for text in (*named, str(directory)):
    assert text in str(caught.value)


@pytest.mark.parametrize("matrix", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("part", ["_blocks", "_scales"])
def test_a_damaged_part_is_named(checkpoint, matrix, part):
  directory, tensors = checkpoint
  name = EXPERTS + matrix + part
  whole = tensors[name]
  for wrong in (
    whole[:-1],
    whole[:, :-1],
    whole[..., :-1],
    whole[..., None],
    whole.astype(np.int8),
    whole.astype(np.float32),
  ):
    changed = tensors | {name: np.ascontiguousarray(wrong)}
    refused(directory, changed, name, str(wrong.shape))
  del tensors[name]
  refused(directory, tensors, name, "missing")


def test_a_plain_matrix_beside_its_blocks_is_named(checkpoint):
  directory, tensors = checkpoint
  name = EXPERTS + "down_proj"
  spare = tensors | {name + "_more": np.ones((5, 32, 64), np.float32)}
  refused(directory, spare, name + "_more")
  twice = tensors | {name: np.ones((5, 32, 64), np.float32)}
  refused(directory, twice, name)


@pytest.mark.parametrize("scale", [253, 254, 255])
def test_a_scale_that_is_no_number_or_overflows_is_named(checkpoint, scale):
  directory, tensors = checkpoint
  name = EXPERTS + "down_proj_scales"
  tensors[name][2, 3, 0] = scale
  refused(directory, tensors, name, str(scale), "252")


def test_blocks_that_config_json_knows_not_of_are_named(checkpoint):
  directory, tensors = checkpoint
  path = directory / "config.json"
  config = json.loads(path.read_text())
  stated = config.pop("quantization_config")
  path.write_text(json.dumps(config))
  refused(directory, tensors, "gate_up_proj", "missing")
  for method in ("fp8", None, 4):
    other = config | {"quantization_config": stated | {"quant_method": method}}
    path.write_text(json.dumps(other))
    refused(directory, tensors, "quantization_config")


def test_a_width_that_blocks_do_not_divide_is_named(checkpoint):
  directory, tensors = checkpoint
  path = directory / "config.json"
  config = json.loads(path.read_text()) | {"intermediate_size": 40}
  path.write_text(json.dumps(config))
  refused(directory, tensors, "40 rows", "multiple of 32")
