"""Published checkpoints written once more: same bytes, same truth."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from dflash_jax import weights
from dflash_jax.weights.safetensors_file import read_safetensors
from tests.drafters import test_dflash as release
from tests.drafters import test_speculators as speculators
from train.export import convert


def tensors_of(directory: pathlib.Path) -> dict:
  """Of a checkpoint: dtype, shape and bytes by name."""
  tensors = read_safetensors(directory / "model.safetensors")
  return {
    name: (tensor.dtype, tensor.shape, tensor.view().tobytes())
    for name, tensor in tensors.items()
  }


def assert_same_checkpoint(found: pathlib.Path, truth: pathlib.Path) -> None:
  """Tensors byte for byte, configs by what they mean.

  How deep the target is, a file of speculators does not say unless asked to.
  """
  assert tensors_of(found) == tensors_of(truth)
  network, _, ids = weights.load_drafter(found)
  expected, _, expected_ids = weights.load_drafter(truth)
  depth = expected.num_target_layers or network.num_target_layers
  assert network == dataclasses.replace(expected, num_target_layers=depth)
  assert np.array_equal(ids, expected_ids)


@pytest.mark.parametrize("name", release.CASES)
def test_a_release_written_again_passes_the_packages_goldens(tmp_path, name):
  golden = json.loads((release.GOLDENS / name / "golden.json").read_text())
  source = release.GOLDENS / name / golden["drafter"]
  convert(str(source), str(tmp_path / "again"))
  assert_same_checkpoint(tmp_path / "again", source)
  case = release.Case(name, tmp_path / "again")
  release.check_round(case, "first", context="first", absorbed=0)


@pytest.mark.parametrize("name", speculators.CASES)
def test_a_file_of_speculators_there_and_back_passes_its_goldens(
  tmp_path, name
):
  source, verifier = (
    speculators.GOLDENS / name,
    speculators.GOLDENS / "verifier",
  )
  there, back = tmp_path / "there", tmp_path / "back"
  convert(str(source), str(there), verifier=str(verifier))
  convert(str(there), str(back), layout="speculators", verifier=str(verifier))
  assert_same_checkpoint(back, source)
  assert speculators.Case(name, back).worst() < speculators.TOLERANCE
