"""Drafters in the published layout: written whole, read back the same."""

import dataclasses
import errno
import json
import os
import pathlib
import resource

import jax
import numpy as np
import pytest
import safetensors.numpy

from dflash_jax import weights
from dflash_jax.config import DrafterConfig, RotaryScaling
from dflash_jax.weights import names
from dflash_jax.weights.drafter_names import drafter_table
from dflash_jax.weights.names import WeightsError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "drafter"

CONFIG = DrafterConfig(
  num_layers=3,
  width=10,
  mlp_width=7,
  num_heads=4,
  num_kv_heads=2,
  head_width=6,
  vocab_size=29,
  block_size=5,
  mask_token_id=3,
  target_layer_ids=(0, 4, 2),
  num_target_layers=6,
  target_width=11,
  rotary_base=500.0,
  max_length=37,
)


def draw(config, seed=0, columns=None):
  rng = np.random.default_rng(seed)
  table = drafter_table(config, columns)
  return names.build_tree(
    table,
    lambda name: rng.normal(size=table[name].shape).astype(np.float32),
    "float32",
  )


@pytest.fixture
def saved(tmp_path):
  """A saved drafter: its directory and parameters."""
  params = draw(CONFIG)
  weights.save_drafter(tmp_path / "d", CONFIG, params, dtype="float32")
  return tmp_path / "d", params


def edit(directory, nested=None, **changes):
  """Changes keys of config.json; "absent" removes one."""
  path = directory / "config.json"
  values = json.loads(path.read_text())
  for part, edits in ((values, changes), (values["dflash_config"], nested)):
    for key, value in (edits or {}).items():
      if value == "absent":
        part.pop(key, None)
      else:
        part[key] = value
  path.write_text(json.dumps(values))


def assert_same(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


# --- Round trips --------------------------------------------------------------


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"layer_windows": (9, 9, 9), "layer_causal": (True, True, True)},
    {"layer_windows": (9, 0, 9), "layer_causal": (True, False, True)},
    {"layer_windows": (9, 0, 9), "layer_causal": (False, False, False)},
    {"layer_windows": (9, 0, 9), "layer_causal": (True, True, True)},
    {"layer_windows": (9, 0, 9), "layer_causal": (False, True, False)},
    {"layer_windows": (9, 0, 5), "layer_causal": (True, False, True)},
    {"layer_windows": (1, 2, 3)},
    {"layer_causal": (True, True, True)},
    {"layer_causal": (True, False, True)},
    {"input_embedding_scale": 2.5, "output_multiplier": 0.75},
    {"logit_softcap": 30.0},
    {"rotary_scaling": RotaryScaling("yarn", 4.0, 16)},
    {
      "rotary_scaling": RotaryScaling(
        "yarn",
        3.0,
        16,
        beta_fast=20.0,
        beta_slow=2.0,
        attention_factor=1.25,
        truncate=False,
      )
    },
    {"rotary_scaling": RotaryScaling("llama3", 8.0, 16, 1.5, 5.0)},
    {"target_layer_ids": (5,), "target_width": 10},
    {"norm_epsilon": 1e-5, "num_kv_heads": 4, "mask_token_id": 0},
  ],
)
def test_a_config_survives_saving(tmp_path, changes):
  config = dataclasses.replace(CONFIG, **changes)
  weights.save_drafter(tmp_path / "d", config, draw(config))
  assert weights.read_drafter_config(tmp_path / "d") == config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_survive_saving(tmp_path, dtype):
  params = draw(CONFIG)
  weights.save_drafter(tmp_path / "d", CONFIG, params, dtype=dtype)
  config, loaded, vocabulary = weights.load_drafter(tmp_path / "d")
  assert config == CONFIG and vocabulary is None
  assert_same(
    loaded, jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
  )
  # The file's own dtype, as another reader sees it.
  stored = safetensors.numpy.load_file(tmp_path / "d" / "model.safetensors")
  assert {x.dtype.name for x in stored.values()} == {dtype}


def test_a_draft_vocabulary_survives_saving(tmp_path):
  ids = np.array([0, 3, 4, 28], np.int32)
  weights.save_drafter(
    tmp_path / "d", CONFIG, draw(CONFIG), draft_vocabulary=ids
  )
  _, _, vocabulary = weights.load_drafter(tmp_path / "d")
  assert vocabulary is not None and vocabulary.dtype == np.int32
  np.testing.assert_array_equal(vocabulary, ids)
  # Engines that load every tensor of the drafter do not meet it.
  stored = safetensors.numpy.load_file(tmp_path / "d" / "model.safetensors")
  assert stored.keys() == drafter_table(CONFIG).keys()


def test_saving_again_replaces_the_drafter(saved):
  directory, _ = saved
  config = dataclasses.replace(CONFIG, block_size=9)
  ids = np.array([1, 2], np.int32)
  weights.save_drafter(directory, config, draw(config), draft_vocabulary=ids)
  weights.save_drafter(directory, config, draw(config, seed=1))
  loaded, _, vocabulary = weights.load_drafter(directory)
  assert loaded.block_size == 9 and vocabulary is None
  assert [path.name for path in directory.parent.iterdir()] == ["d"]


# --- The published layout -----------------------------------------------------


def test_the_published_keys_are_written_where_engines_look(saved):
  directory, _ = saved
  values = json.loads((directory / "config.json").read_text())
  assert values["architectures"] == ["DFlashDraftModel"]
  assert values["model_type"] == "qwen3"
  assert values["num_target_layers"] == 6
  assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 500
  assert values["layer_types"] == ["full_attention"] * 3
  assert values["torch_dtype"] == "float32"
  assert values["tie_word_embeddings"] is False
  assert "is_causal" not in values and "layer_windows" not in values
  assert values["block_size"] == values["dflash_config"]["block_size"] == 5
  assert values["dflash_config"]["target_layer_ids"] == [0, 4, 2]
  assert values["dflash_config"]["mask_token_id"] == 3
  with safetensors.safe_open(directory / "model.safetensors", "np") as file:
    assert file.metadata() == {"format": "pt"}
    assert file.get_slice("fc.weight").get_shape() == [10, 33]


@pytest.mark.parametrize(
  "changes",
  [
    {"layer_windows": (9, 0, 5), "layer_causal": (True, False, True)},
    {"layer_windows": (9, 0, 9), "layer_causal": (False, True, False)},
  ],
)
def test_mixtures_that_other_engines_would_misread_name_themselves(
  tmp_path, changes
):
  config = dataclasses.replace(CONFIG, **changes)
  weights.save_drafter(tmp_path / "d", config, draw(config))
  values = json.loads((tmp_path / "d" / "config.json").read_text())
  assert values["architectures"] == ["DFlashMixedDraftModel"]


def test_extra_facts_are_kept_apart_from_the_published_keys(tmp_path):
  extra = {"hidden_size": 3, "steps": 1000}
  weights.save_drafter(tmp_path / "d", CONFIG, draw(CONFIG), extra=extra)
  values = json.loads((tmp_path / "d" / "config.json").read_text())
  assert values["dflash_jax"] == extra and values["hidden_size"] == 10
  assert weights.read_drafter_config(tmp_path / "d") == CONFIG


def test_older_checkpoints_without_a_nested_section_are_read(saved):
  directory, _ = saved
  path = directory / "config.json"
  values = json.loads(path.read_text())
  nested = values.pop("dflash_config")
  path.write_text(json.dumps(values | nested))
  assert weights.read_drafter_config(directory) == CONFIG


def test_nested_keys_override_the_top_level(saved):
  directory, _ = saved
  edit(directory, nested={"block_size": 8}, block_size=16, mask_token_id=1)
  config = weights.read_drafter_config(directory)
  assert (config.block_size, config.mask_token_id) == (8, 3)


def test_missing_keys_take_the_published_defaults(saved):
  directory, _ = saved
  absent = ("target_layer_ids", "input_embedding_scale", "output_multiplier")
  edit(
    directory,
    nested=dict.fromkeys((*absent, "block_size"), "absent"),
    block_size="absent",
    layer_types="absent",
    num_target_layers=36,
  )
  config = weights.read_drafter_config(directory)
  assert config.block_size == 16
  assert config.target_layer_ids == (1, 17, 33)
  assert config.input_embedding_scale == config.output_multiplier == 1.0


@pytest.mark.parametrize(
  ("changes", "windows", "causal"),
  [
    (
      {
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "use_sliding_window": True,
        "sliding_window": 8,
      },
      (8, 8, 0),
      (True, True, False),
    ),
    (
      {
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "use_sliding_window": True,
        "sliding_window": 8,
        "is_causal": False,
      },
      (8, 8, 0),
      (False, False, False),
    ),
    ({"is_causal": True}, (0, 0, 0), (True, True, True)),
    (
      {
        "layer_types": "absent",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
      },
      (0, 0, 8),
      (False, False, True),
    ),
    # A sliding layer keeps its causality when its window is switched off.
    (
      {
        "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
        "use_sliding_window": False,
        "sliding_window": 8,
      },
      (0, 0, 0),
      (True, True, False),
    ),
  ],
)
def test_windows_and_causality_follow_the_published_rule(
  saved, changes, windows, causal
):
  directory, _ = saved
  edit(directory, **changes)
  config = weights.read_drafter_config(directory)
  assert (config.layer_windows, config.layer_causal) == (windows, causal)


@pytest.mark.parametrize("softcap", [None, 0, -1.0])
def test_a_softcap_that_is_not_positive_is_none(saved, softcap):
  directory, _ = saved
  edit(directory, nested={"final_logit_softcapping": softcap})
  assert weights.read_drafter_config(directory).logit_softcap is None


def test_copies_of_the_targets_tensors_are_ignored(saved):
  directory, params = saved
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  extra = {
    "lm_head.weight": np.ones((29, 10), np.float32),
    "embed_tokens.weight": np.ones((29, 10), np.float32),
    "rotary_emb.inv_freq": np.ones(3, np.float32),
  }
  safetensors.numpy.save_file(tensors | extra, path)
  assert_same(weights.load_drafter(directory)[1], params)


@pytest.mark.parametrize(
  "case",
  sorted(p.parent.name for p in GOLDENS.glob("*/model.safetensors")),
)
def test_drafters_of_the_dflash_package_survive_saving(case, tmp_path):
  directory = GOLDENS / case
  config, params, _ = weights.load_drafter(directory)
  weights.save_drafter(tmp_path / "d", config, params, dtype="float32")
  assert weights.read_drafter_config(tmp_path / "d") == config
  ours, theirs = (
    safetensors.numpy.load_file(place / "model.safetensors")
    for place in (tmp_path / "d", directory)
  )
  assert_same(ours, theirs)


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ("nested", "changes", "named"),
  [
    ({}, {"architectures": ["DFlash2DraftModel"]}, "conv_kernel_size"),
    ({}, {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    ({}, {"architectures": "absent"}, "architectures is missing"),
    ({}, {"architectures": "DFlashDraftModel"}, "architectures"),
    ({}, {"model_type": "llama"}, "model_type='llama'"),
    ({}, {"attention_bias": True}, "attention_bias"),
    ({}, {"hidden_act": "gelu"}, "gelu"),
    ({}, {"dflash_config": [1]}, "dflash_config"),
    ({"mask_token_id": "absent"}, {}, "mask_token_id is missing"),
    ({"mask_token_id": 29}, {}, "mask_token_id=29"),
    ({"block_size": 1}, {}, "block_size=1"),
    ({"target_layer_ids": [0, 6, 2]}, {}, "tap 6"),
    ({"target_layer_ids": [0, "1"]}, {}, "target_layer_ids"),
    ({"target_layer_ids": [0, 1]}, {}, "fc.weight has shape (10, 33)"),
    ({"target_layer_ids": []}, {}, "fc.weight"),
    ({"target_layer_ids": "absent"}, {"num_target_layers": 2}, "num_taps"),
    ({}, {"num_target_layers": "absent"}, "num_target_layers"),
    ({}, {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ({}, {"is_causal": "yes"}, "is_causal"),
    ({}, {"rope_theta": 7.0}, "rope_theta"),
    ({}, {"architectures": ["DFlashMixedDraftModel"]}, "layer_windows"),
  ],
)
def test_settings_that_cannot_be_honoured_are_named(
  saved, nested, changes, named
):
  directory, _ = saved
  edit(directory, nested=nested, **changes)
  with pytest.raises(WeightsError) as caught:
    weights.read_drafter_config(directory)
  assert named in str(caught.value) and str(directory) in str(caught.value)


@pytest.mark.parametrize("fault", ["missing", "spare", "shape", "no fc"])
def test_a_tensor_that_does_not_fit_is_named(saved, fault):
  directory, _ = saved
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  name = "layers.2.self_attn.k_norm.weight"
  match fault:
    case "missing":
      del tensors[name]
    case "spare":
      name = "layers.2.attention_conv.base_kernel"
      tensors[name] = np.ones((2, 3, 10), np.float32)
    case "shape":
      tensors[name] = np.ones(7, np.float32)
    case "no fc":
      name = "fc.weight"
      del tensors[name]
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(WeightsError) as caught:
    weights.load_drafter(directory)
  assert name in str(caught.value) and str(directory) in str(caught.value)


@pytest.mark.parametrize(
  "name", ["model.safetensors", "config.json", "draft_vocabulary.safetensors"]
)
def test_a_copy_that_was_cut_short_is_named(tmp_path, name):
  directory = tmp_path / "d"
  ids = np.arange(5, dtype=np.int32)
  weights.save_drafter(directory, CONFIG, draw(CONFIG), draft_vocabulary=ids)
  data = (directory / name).read_bytes()
  # The last byte of config.json is a newline.
  for length in [*range(0, len(data) - 2, 31), len(data) - 2]:
    (directory / name).write_bytes(data[:length])
    with pytest.raises(WeightsError, match=name):
      weights.load_drafter(directory)


VOCABULARIES: dict[str, np.ndarray] = {
  "unsorted": np.array([3, 1], np.int32),
  "repeated": np.array([1, 1], np.int32),
  "negative": np.array([-1, 1], np.int32),
  "too large": np.array([1, 29], np.int32),
  "empty": np.array([], np.int32),
  "wide": np.array([1, 3], np.int64),
  "square": np.array([[1, 3]], np.int32),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_an_unsound_draft_vocabulary_is_neither_written_nor_read(saved, kind):
  directory, params = saved
  ids = VOCABULARIES[kind]
  with pytest.raises(WeightsError, match="draft vocabulary"):
    weights.save_drafter(directory, CONFIG, params, draft_vocabulary=ids)
  path = directory / "draft_vocabulary.safetensors"
  safetensors.numpy.save_file({"ids": ids}, path)
  with pytest.raises(WeightsError, match="draft_vocabulary"):
    weights.load_drafter(directory)


def test_a_vocabulary_file_with_other_tensors_is_named(saved):
  directory, _ = saved
  path = directory / "draft_vocabulary.safetensors"
  safetensors.numpy.save_file({"d2t": np.ones(3, np.int32)}, path)
  with pytest.raises(WeightsError, match="d2t"):
    weights.load_drafter(directory)


def test_parameters_of_another_drafter_are_not_saved(tmp_path):
  other = dataclasses.replace(
    CONFIG, num_layers=2, layer_windows=(), layer_causal=()
  )
  with pytest.raises(WeightsError, match=r"layers\.2\."):
    weights.save_drafter(tmp_path / "d", CONFIG, draw(other))
  assert not list(tmp_path.iterdir())


# --- Failed writes ------------------------------------------------------------


def entries(directory):
  return sorted(path.name for path in directory.iterdir())


def test_a_full_disk_leaves_the_earlier_drafter(saved):
  directory, params = saved
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # The kernel refuses the write itself, as it does on a full disk.
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
  try:
    for place in (directory, directory.parent / "new"):
      with pytest.raises(WeightsError, match="cannot be written"):
        weights.save_drafter(place, CONFIG, draw(CONFIG, seed=1))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert entries(directory.parent) == ["d"]
  assert_same(weights.load_drafter(directory)[1], params)


@pytest.mark.parametrize("call", range(6))
def test_a_write_that_fails_at_any_sync_leaves_one_whole_drafter(
  saved, monkeypatch, call
):
  directory, params = saved
  calls = []
  sync = os.fsync

  def fail_once(descriptor):
    calls.append(descriptor)
    if len(calls) == call + 1:
      raise OSError(errno.ENOSPC, "No space left on device")
    sync(descriptor)

  changed = draw(CONFIG, seed=1)
  monkeypatch.setattr(os, "fsync", fail_once)
  if call < 4:
    with pytest.raises(WeightsError, match="No space left"):
      weights.save_drafter(directory, CONFIG, changed, dtype="float32")
  else:
    weights.save_drafter(directory, CONFIG, changed, dtype="float32")
  assert entries(directory.parent) == ["d"]
  assert entries(directory) == ["config.json", "model.safetensors"]
  # Only the sync of the parent directory comes after the new one is in place.
  expected = params if call < 3 else changed
  assert_same(weights.load_drafter(directory)[1], expected)


def test_a_swap_that_fails_puts_the_earlier_drafter_back(saved, monkeypatch):
  directory, params = saved
  rename = pathlib.Path.rename

  def fail_into_place(self, target):
    if pathlib.Path(target) == directory and not self.name.endswith(".old"):
      raise OSError(errno.EIO, "Input/output error")
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, "rename", fail_into_place)
  with pytest.raises(WeightsError, match="Input/output error"):
    weights.save_drafter(directory, CONFIG, draw(CONFIG, seed=1))
  assert entries(directory.parent) == ["d"]
  assert_same(weights.load_drafter(directory)[1], params)


def test_a_directory_with_other_files_is_not_replaced(saved):
  directory, params = saved
  (directory / "notes.txt").write_text("mine")
  with pytest.raises(WeightsError, match=r"notes\.txt"):
    weights.save_drafter(directory, CONFIG, draw(CONFIG, seed=1))
  assert (directory / "notes.txt").read_text() == "mine"
  assert_same(weights.load_drafter(directory)[1], params)


def test_a_file_in_the_way_is_named(tmp_path):
  (tmp_path / "d").write_text("mine")
  for place in (tmp_path / "d", tmp_path / "d" / "inner"):
    with pytest.raises(WeightsError, match="/d"):
      weights.save_drafter(place, CONFIG, draw(CONFIG))
  assert entries(tmp_path) == ["d"]
