"""Export in the speculators layout: of runs, of directories, and back."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs.tiny import get_config
from dflash_jax import weights
from dflash_jax.config import ConfigError, DraftConfig
from dflash_jax.generate import generate
from dflash_jax.model import load, load_target
from dflash_jax.weights import WeightsError
from dflash_jax.weights.safetensors_file import read_safetensors
from tests.commands import save_tiny_drafter
from tests.train.test_export_fp8 import write_drafter
from tests.train.test_export_parts import IDS, assert_same, random_state
from train.checkpoint import Checkpoints
from train.design import design_drafter, make_drafter
from train.export import convert, export
from train.record import Run, write_run

STORED = pathlib.Path(__file__).parents[1] / "goldens" / "speculators"
HUB = "owner/target"


def files_of(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def values_of(directory):
  return json.loads((directory / "config.json").read_text())


def dtypes_of(directory):
  tensors = read_safetensors(directory / "model.safetensors")
  return {tensor.dtype for tensor in tensors.values()}


def quick(*kinds, slow=()):
  """Parameters: kinds that every run tests, and those that few do."""
  return [
    *kinds,
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in slow),
  ]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory):
  """The target of configs/tiny.py, in a directory."""
  directory = tmp_path_factory.mktemp("target") / "verifier"
  target, params = load_target(get_config())
  weights.save_target(directory, target.config, params, dtype="float32")
  return str(directory)


# --- Directories --------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_the_same_file(tmp_path, dtype):
  """Stored dtypes stay, whatever they are, and so does what is written."""
  first, there, back = (tmp_path / name for name in ("first", "there", "back"))
  convert(save_tiny_drafter(tmp_path / "d"), str(first), dtype=dtype)
  convert(str(first), str(there), layout="speculators", verifier=HUB)
  convert(str(there), str(back))
  stored = {"float32": "F32", "bfloat16": "BF16"}[dtype]
  assert dtypes_of(first) == dtypes_of(there) == {stored}
  assert values_of(there)["dtype"] == dtype
  assert files_of(back) == files_of(first)


@pytest.mark.parametrize("name", ["dspark", "eagle3"])
def test_what_the_package_wrote_is_written_again(tmp_path, name):
  convert(str(STORED / name), str(tmp_path / "s"), layout="speculators")
  first, again = (
    safetensors.numpy.load_file(place / "model.safetensors")
    for place in (STORED / name, tmp_path / "s")
  )
  assert_same(again, first)
  asked, found = (
    values_of(place)["speculators_config"]
    for place in (STORED / name, tmp_path / "s")
  )
  assert found == asked


def test_a_named_verifier_replaces_the_one_in_the_file(tmp_path):
  source, place = str(STORED / "dspark"), str(STORED / "verifier")
  convert(source, str(tmp_path / "s"), layout="speculators", verifier=place)
  values = values_of(tmp_path / "s")
  assert values["speculators_config"]["verifier"]["name_or_path"] == place
  assert values["num_target_layers"] == 8
  convert(source, str(tmp_path / "z"), verifier=place)
  assert values_of(tmp_path / "z")["num_target_layers"] == 8
  # What the release's layout leaves out comes from the target again.
  convert(
    str(tmp_path / "z"),
    str(tmp_path / "again"),
    layout="speculators",
    verifier=place,
  )
  assert (
    files_of(tmp_path / "again")["model.safetensors"]
    == (files_of(tmp_path / "s")["model.safetensors"])
  )


def test_mixed_dtypes_stay_as_they_are(tmp_path):
  source = pathlib.Path(save_tiny_drafter(tmp_path / "d"))
  path = source / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  half = jnp.bfloat16
  tensors["fc.weight"] = np.asarray(jnp.asarray(tensors["fc.weight"], half))
  tensors["norm.weight"] = tensors["norm.weight"].astype(np.float16)
  safetensors.numpy.save_file(tensors, path)
  for layout in ("release", "speculators"):
    place = tmp_path / layout
    convert(str(source), str(place), layout=layout, verifier=HUB)
    found = safetensors.numpy.load_file(place / "model.safetensors")
    assert_same(found, tensors)
    assert {found[name].dtype == x.dtype for name, x in tensors.items()} == {
      True
    }


@pytest.mark.parametrize("kind", quick("eagle3", slow=("dflash2", "dspark")))
def test_a_drafter_in_8_bits_goes_through_the_layout(tmp_path, kind):
  write_drafter(tmp_path / "whole", kind)
  whole, small = str(tmp_path / "whole"), str(tmp_path / "small")
  convert(whole, small, quantize="fp8")
  there, back = tmp_path / "there", tmp_path / "back"
  convert(small, str(there), layout="speculators", verifier=HUB)
  assert values_of(there)["quantization_config"]["format"] == "float-quantized"
  assert "F8_E4M3" in dtypes_of(there)
  convert(str(there), str(back))
  assert files_of(back) == files_of(tmp_path / "small")


@pytest.mark.parametrize("kind", quick("dspark", slow=("dflash2", "eagle3")))
def test_commands_decode_with_a_drafter_in_the_layout(tmp_path, kind):
  config = write_drafter(tmp_path / "z", kind)
  expected = generate(load(config), "Hi", max_new_tokens=13)
  place = str(tmp_path / "s")
  convert(config.drafter.path, place, layout="speculators", verifier=HUB)
  config.drafter.path = place
  found = generate(load(config), "Hi", max_new_tokens=13)
  assert (found.text, found.rounds) == (expected.text, expected.rounds)


# --- Runs ---------------------------------------------------------------------


def make_run(directory, draft, target_path="", ids=IDS):
  """A run with one checkpoint of a random drafter; network and parameters."""
  config = get_config()
  config.drafter = draft
  network = design_drafter(config, config.target.random)
  config.target.path = target_path
  drafter = make_drafter(config.drafter, network)
  write_run(str(directory), config, Run("sum", network, ids))
  columns = None if ids is None else len(ids)
  state = random_state(drafter, columns, averaged=False)
  checkpoints = Checkpoints(directory, keep=1)
  checkpoints.save(state, tau=2.0)
  checkpoints.close()
  return network, state.drafter


def test_a_run_brings_its_targets_name_and_head(tmp_path, verifier):
  draft = DraftConfig(
    name="dspark", block_size=4, taps=(1, 3), num_layers=1, markov_rank=4
  )
  network, params = make_run(tmp_path / "run", draft, verifier)
  export(
    str(tmp_path / "run"),
    str(tmp_path / "s"),
    dtype="float32",
    layout="speculators",
  )
  found, loaded, ids = weights.load_drafter(tmp_path / "s")
  assert found == network
  assert tuple(ids) == IDS
  assert_same(loaded, params)
  assert weights.read_speculators_serving(tmp_path / "s") == weights.Serving(
    verifier, ("LlamaForCausalLM",), 4
  )
  _, target = weights.load_target(verifier)
  np.testing.assert_array_equal(
    weights.read_speculators_head(tmp_path / "s"),
    np.asarray(target["head"]["kernel"]).T[list(IDS)],
  )


def test_a_run_on_a_random_target_needs_the_targets_name(tmp_path, verifier):
  draft = DraftConfig(
    name="eagle3",
    block_size=6,
    taps=(1, 3, 4),
    num_layers=1,
    draft_vocabulary=len(IDS),
  )
  network, params = make_run(tmp_path / "run", draft)
  how = {"dtype": "float32", "layout": "speculators"}
  run, place = str(tmp_path / "run"), str(tmp_path / "s")
  with pytest.raises(WeightsError, match="--verifier"):
    export(run, place, **how)
  assert not (tmp_path / "s").exists()
  export(run, place, verifier=verifier, **how)
  found, loaded = weights.load_eagle3(place)
  assert found == network
  assert loaded.pop("head_ids").tolist() == list(IDS)
  assert_same(loaded, params)
  assert weights.read_speculators_serving(place) == weights.Serving(
    verifier, ("LlamaForCausalLM",), 5
  )


# --- Refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"layout": "zlab"}, "--layout=zlab is unknown; choose release or spec"),
    ({"source": "lm"}, "no place for a small language model"),
    ({"verifier": "other"}, "drafter and target do not match"),
    ({"verifier": ""}, "--verifier"),
  ],
)
def test_what_cannot_be_is_named(tmp_path, monkeypatch, change, message):
  save_tiny_drafter(tmp_path / "blocks")
  monkeypatch.chdir(tmp_path)
  target, params = load_target(get_config())
  weights.save_target("lm", target.config, params)
  config = dataclasses.replace(target.config, vocab_size=300)
  table = jnp.zeros((300, config.width))
  tables = {"embedding": table, "head": {"kernel": table.T}}
  weights.save_target("other", config, params | tables)
  asked = {
    "source": "blocks",
    "output": "new",
    "layout": "speculators",
    "verifier": HUB,
  }
  with pytest.raises((ConfigError, WeightsError), match=message):
    convert(**asked | change)
  assert not (tmp_path / "new").exists()
