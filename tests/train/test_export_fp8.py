"""Export in 8 bits: every kind of drafter, from directories that exist."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs.tiny import get_config
from dflash_jax import fp8, weights
from dflash_jax.config import ConfigError, DecodeConfig, DraftConfig
from dflash_jax.drafters import DFlash, Eagle3
from dflash_jax.generate import generate
from dflash_jax.model import load
from tests.commands import run_module, save_tiny_drafter
from tests.testing import random_params
from train.design import design_drafter, make_drafter
from train.export import convert

KINDS = {
  "dflash2": {"name": "dflash2", "selector_rank": 6, "selector_top_k": 5},
  "eagle3": {"name": "eagle3", "num_layers": 1},
  "causal": {"name": "dflash", "layer_causal": (True,)},
  "dspark": {"name": "dspark", "markov_rank": 8, "markov_kind": "rnn"},
  "domino": {"name": "domino", "gru_width": 24, "gru_rank": 10},
  "lm": {"name": "lm", "lm_width": 14},
}
QUICK = ("dflash2", "eagle3")


def write_drafter(directory, kind, dtype="float32"):
  """A random drafter of a kind for configs/tiny.py; the config with it."""
  config = get_config()
  sizes = {"block_size": 4, "taps": (1, 3, 4), "num_layers": 1}
  config.drafter = DraftConfig(**sizes | KINDS[kind])
  network = design_drafter(config, config.target.random)
  drafter = make_drafter(config.drafter, network)
  params = random_params(drafter, seed=3)
  if isinstance(drafter, DFlash):
    weights.save_drafter(directory, network, params, dtype=dtype)
  elif isinstance(drafter, Eagle3):
    weights.save_eagle3(directory, network, params, dtype=dtype)
  else:
    bound = drafter.bind(params)
    weights.save_target(directory, network, bound, dtype=dtype)
  config.drafter = DraftConfig(path=str(directory), block_size=4)
  config.decode = DecodeConfig(max_length=64, width="fixed:3")
  return config


@pytest.mark.parametrize(
  "kind",
  [
    pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow)
    for kind in KINDS
  ],
)
def test_every_kind_of_drafter_decodes_in_8_bits(tmp_path, kind):
  config = write_drafter(tmp_path / "whole", kind)
  exported = convert(
    str(tmp_path / "whole"), str(tmp_path / "small"), quantize="fp8"
  )
  assert exported.weight_bytes < exported.whole_bytes
  config.drafter.path = str(tmp_path / "small")
  model = load(config)
  leaves = jax.tree.leaves(model.params.drafter, is_leaf=fp8.is_kernel)
  assert sum(map(fp8.is_kernel, leaves)) >= 7
  text = generate(model, "Hi", max_new_tokens=13).text
  assert text == generate(model.without_drafter(), "Hi", max_new_tokens=13).text


def test_8_bits_halve_the_bytes_of_bfloat16(tmp_path):
  source = save_tiny_drafter(tmp_path / "whole", width=64, mlp_width=256)
  small = str(tmp_path / "small")
  exported = convert(source, small, dtype="bfloat16", quantize="fp8")
  params = weights.load_drafter(source)[1]
  leaves = jax.tree.leaves(params)
  numbers = sum(leaf.size for leaf in leaves)
  channels = sum(leaf.shape[1] for leaf in leaves if leaf.ndim == 2)
  norms = sum(leaf.size for leaf in leaves if leaf.ndim == 1)
  assert exported.whole_bytes == 2 * numbers
  assert exported.weight_bytes == numbers + norms + 4 * channels
  assert exported.weight_bytes < 0.56 * exported.whole_bytes
  file = (tmp_path / "small" / "model.safetensors").stat().st_size
  assert 0 < file - exported.weight_bytes < 5000  # its header


def test_facts_of_an_earlier_export_and_the_vocabulary_are_kept(tmp_path):
  network, params, _ = weights.load_drafter(
    save_tiny_drafter(tmp_path / "first")
  )
  ids, facts = np.array([0, 5, 7], np.int32), {"step": 9, "held_out_tau": 2.5}
  weights.save_drafter(
    tmp_path / "d", network, params, draft_vocabulary=ids, extra=facts
  )
  convert(str(tmp_path / "d"), str(tmp_path / "small"), quantize="fp8")
  _, _, found = weights.load_drafter(tmp_path / "small")
  np.testing.assert_array_equal(found, ids)
  values = json.loads((tmp_path / "small" / "config.json").read_text())
  assert values["dflash_jax"] == facts


def test_a_drafter_in_8_bits_is_written_again_as_it_is(tmp_path):
  source = save_tiny_drafter(tmp_path / "whole")
  convert(source, str(tmp_path / "small"), quantize="fp8")
  convert(str(tmp_path / "small"), str(tmp_path / "again"))
  first, second = (
    (tmp_path / name / "model.safetensors").read_bytes()
    for name in ("small", "again")
  )
  assert first == second


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"source": "ngram"}, "--drafter=ngram has no weights"),
    ({"source": "none"}, "--drafter=none has no weights"),
    ({"source": "small"}, "is in 8 bits already"),
    ({"quantize": "int8"}, "--quantize=int8 is unknown; choose fp8"),
    ({"dtype": "float16"}, "--dtype=float16 is unknown"),
  ],
)
def test_what_cannot_be_quantised_is_named(
  tmp_path, monkeypatch, change, message
):
  save_tiny_drafter(tmp_path / "whole")
  convert(str(tmp_path / "whole"), str(tmp_path / "small"), quantize="fp8")
  monkeypatch.chdir(tmp_path)
  asked = {"source": "whole", "output": "new", "quantize": "fp8"} | change
  with pytest.raises(ConfigError, match=message):
    convert(**asked)
  assert not (tmp_path / "new").exists()


def test_the_program_says_what_8_bits_save_in_any_layout(tmp_path):
  source = save_tiny_drafter(tmp_path / "whole")
  done = run_module(
    "train.export",
    f"--drafter={source}",
    f"--output={tmp_path / 'small'}",
    "--quantize=fp8",
    "--dtype=float32",
    "--layout=speculators",
    "--verifier=owner/target",
  )
  assert done.returncode == 0, done.stderr
  values = json.loads((tmp_path / "small" / "config.json").read_text())
  assert values["speculators_model_type"] == "dflash"
  verifier = values["speculators_config"]["verifier"]
  assert verifier["name_or_path"] == "owner/target"
  first, second = done.stdout.splitlines()
  assert f"{tmp_path / 'small'}: " in first and "parameters in" in first
  assert "MiB without; L2 caches: H100 50 MiB, B200 126 MiB" in second


def test_bytes_of_a_drafter_do_not_count_what_it_borrows(tmp_path):
  config = write_drafter(tmp_path / "whole", "eagle3")
  model = load(config)
  own = weights.load_eagle3(tmp_path / "whole", num_target_layers=5)[1]
  size = sum(leaf.size for leaf in jax.tree.leaves(own))
  assert model.drafter_bytes == 4 * size
  assert model.without_drafter().drafter_bytes == 0
  half = dataclasses.replace(model.config.target, dtype="bfloat16")
  other = dataclasses.replace(model.config, target=half)
  assert dataclasses.replace(model, config=other).drafter_bytes == 2 * size
