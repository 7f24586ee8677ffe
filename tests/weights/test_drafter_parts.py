"""DFlash 2, DSpark and Domino in files: keys, tensors, trimmed tables."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from dflash_jax import weights
from dflash_jax.drafters import DFlash
from dflash_jax.networks import (
  Confidence,
  Convolution,
  DrafterConfig,
  Gru,
  Markov,
  Selector,
)
from dflash_jax.weights.names import WeightsError
from tests.testing import VARIANTS
from tests.weights.test_drafter import CONFIG, assert_same, draw, edit

MIXTURES = {
  "convolution alone": {"convolution": Convolution(2, 5)},
  "selector alone": {"selector": Selector(4, 29)},
  "anchor alone": {"anchor_predicts": True},
  "convolution, Markov": {
    "convolution": Convolution(1, 10),
    "markov": Markov(4, "rnn"),
    "confidence": Confidence(),
  },
  "convolution, GRU, anchor": {
    "convolution": Convolution(2, 2),
    "gru": Gru(3, 2, 0),
    "anchor_predicts": True,
  },
  "GRU, confidence": {
    "gru": Gru(3, 2, 4),
    "confidence": Confidence(sees_token=False),
  },
  "windows": {
    "layer_windows": (9, 0, 5),
    "layer_causal": (True, False, True),
    "gru": Gru(3, 2),
  },
  "Markov, no anchor": {"markov": Markov(4)},
  "confidence alone": {"confidence": Confidence(sees_token=False)},
}
NAMES = {
  "dflash2": "DFlash2DraftModel",
  "dspark": "DSparkDraftModel",
  "dspark gated": "DSparkDraftModel",
  "dspark rnn": "DSparkDraftModel",
  "domino": "DominoDraftModel",
  "domino shifted": "DominoDraftModel",
  "Markov, no anchor": "DSparkDraftModel",
  "confidence alone": "DSparkDraftModel",
}
ALL = VARIANTS | MIXTURES


def with_parts(name: str) -> DrafterConfig:
  return dataclasses.replace(CONFIG, **ALL[name])


def save(directory, name: str, **settings):
  config = with_parts(name)
  params = draw(config)
  weights.save_drafter(directory, config, params, dtype="float32", **settings)
  return config, params


def values_of(directory):
  return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", ALL)
def test_a_drafter_with_parts_survives_saving(tmp_path, name):
  config, params = save(tmp_path / "d", name)
  read, loaded, _ = weights.load_drafter(tmp_path / "d")
  assert read == config
  assert_same(loaded, params)


@pytest.mark.parametrize("name", ALL)
def test_what_engines_know_goes_under_its_own_name(tmp_path, name):
  """And what they do not know must not load as what they do."""
  save(tmp_path / "d", name)
  values = values_of(tmp_path / "d")
  expected = NAMES.get(name, "DFlashMixedDraftModel")
  assert values["architectures"] == [expected]
  assert values["auto_map"]["AutoModel"].endswith(expected)


@pytest.mark.parametrize("name", ALL)
def test_drawn_parameters_have_the_shapes_of_stored_ones(name):
  config = with_parts(name)
  for columns in (None, 11):
    drawn = jax.eval_shape(
      lambda key, columns=columns: DFlash(config).init(key, columns=columns),
      jax.random.key(0),
    )
    shapes = jax.tree.map(lambda leaf: leaf.shape, drawn)
    assert shapes == jax.tree.map(np.shape, draw(config, columns=columns))


def test_published_keys_are_written(tmp_path):
  save(tmp_path / "2", "dflash2")
  nested = values_of(tmp_path / "2")["dflash_config"]
  assert nested["conv_kernel_size"] == 3 and nested["conv_group_size"] == 2
  assert nested["selector_rank"] == 5 and nested["selector_top_k"] == 7
  assert "sample_from_anchor" not in nested and "projector_type" not in nested
  save(tmp_path / "s", "dspark gated")
  nested = values_of(tmp_path / "s")["dflash_config"]
  assert nested["projector_type"] == "dspark"
  assert nested["markov_rank"] == 3 and nested["markov_head_type"] == "gated"
  assert nested["enable_confidence_head"] is True
  assert nested["confidence_head_with_markov"] is False
  assert nested["sample_from_anchor"] is nested["shift_label"] is True
  save(tmp_path / "o", "domino")
  values = values_of(tmp_path / "o")
  nested = values["dflash_config"]
  assert nested["projector_type"] == "domino"
  assert nested["shift_label"] is False
  assert nested["gru_hidden_dim"] == 7 and nested["pure_draft_prefix_len"] == 1
  assert nested["emb_dim"] == values["emb_dim"] == 5


def test_a_causal_drafter_says_so_where_each_engine_looks(tmp_path):
  config = dataclasses.replace(CONFIG, layer_causal=(True, True, True))
  weights.save_drafter(tmp_path / "d", config, draw(config))
  values = values_of(tmp_path / "d")
  assert values["is_causal"] is values["dflash_config"]["causal"] is True
  edit(tmp_path / "d", is_causal="absent")
  assert weights.read_drafter_config(tmp_path / "d") == config


# --- Other exporters ----------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "nested", "changes", "expected"),
  [
    # DeepSpec: keys at the top level, no word of the anchor.
    (
      "dspark",
      dict.fromkeys(("projector_type", "sample_from_anchor", "shift_label"))
      | {"markov_rank": None},
      {"architectures": ["Qwen3DSparkModel"], "markov_rank": 6},
      {},
    ),
    # ModelOpt: DFlash's name, its own keys.
    (
      "dspark",
      {
        "sample_from_anchor": None,
        "enable_confidence_head": None,
        "confidence_head_with_markov": None,
        "use_confidence_head": True,
      },
      {"architectures": ["DFlashDraftModel"]},
      {},
    ),
    # SpecForge: a weight of the loss means a head.
    (
      "dspark gated",
      {"enable_confidence_head": None, "confidence_head_alpha": 0.5}
      | dict.fromkeys(("sample_from_anchor", "shift_label")),
      {},
      {},
    ),
    (
      "dspark",
      {"sample_from_anchor": False, "shift_label": None},
      {},
      {"anchor_predicts": False},
    ),
    (
      "domino",
      dict.fromkeys(("sample_from_anchor", "shift_label", "emb_dim")),
      {"architectures": ["DFlashDraftModel"]},
      {},
    ),
    (
      "domino",
      {"query_zero_predicts_next": True, "sample_from_anchor": None}
      | dict.fromkeys(("shift_label", "pure_draft_prefix_len")),
      {},
      {"anchor_predicts": True, "gru": Gru(7, 5, 0)},
    ),
  ],
)
def test_other_exporters_keys_are_read(
  tmp_path, name, nested, changes, expected
):
  config, _ = save(tmp_path / "d", name)
  edit(tmp_path / "d", nested=nested, **changes)
  read = weights.read_drafter_config(tmp_path / "d")
  assert read == dataclasses.replace(config, **expected)


def rename(directory, renamed):
  path = directory / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  names = {renamed(name): tensor for name, tensor in tensors.items()}
  safetensors.numpy.save_file(names, path)


@pytest.mark.parametrize("name", ["dspark", "dspark rnn", "domino"])
def test_other_exporters_names_are_read(tmp_path, name):
  _, params = save(tmp_path / "d", name)
  heads = ("markov_head.", "prefix_gru.", "embed_proj.", "confidence_head.")

  def nest(tensor):
    return f"logit_head.{tensor}" if tensor.startswith(heads) else tensor

  rename(tmp_path / "d", nest)
  assert_same(weights.load_drafter(tmp_path / "d")[1], params)
  rename(
    tmp_path / "d",
    lambda tensor: (
      tensor.removeprefix("logit_head.")
      .removeprefix("markov_head.")
      .replace("confidence_head.proj", "confidence_proj")
    ),
  )
  assert_same(weights.load_drafter(tmp_path / "d")[1], params)


def test_a_tensor_under_two_names_is_refused(tmp_path):
  save(tmp_path / "d", "dspark")
  path = tmp_path / "d" / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  tensors["markov_w1.weight"] = tensors["markov_head.markov_w1.weight"] + 1
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(WeightsError, match=r"markov_head\.markov_w1.*twice"):
    weights.load_drafter(tmp_path / "d")


# --- Draft vocabularies -------------------------------------------------------

TABLES = {
  "dflash2": ("successors", 0, "candidate_selector.successor_codebook"),
  "dspark": ("after", 1, "markov_head.markov_w2.weight"),
  "domino": ("widen", 1, "embed_proj.2.weight"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_trimmed_head_has_its_rows_alone_in_memory(tmp_path, name):
  """Files hold every token's row; those that the head lacks are zero."""
  ids = np.array([0, 5, 6, 17, 28], np.int32)
  config = with_parts(name)
  params = draw(config, columns=ids.size)
  weights.save_drafter(
    tmp_path / "d", config, params, draft_vocabulary=ids, dtype="float32"
  )
  _, loaded, vocabulary = weights.load_drafter(tmp_path / "d")
  np.testing.assert_array_equal(vocabulary, ids)
  assert_same(loaded, params)
  key, axis, file = TABLES[name]
  trimmed = params["corrector"][key]
  trimmed = trimmed if axis == 0 else trimmed["kernel"].T
  stored = safetensors.numpy.load_file(tmp_path / "d" / "model.safetensors")
  np.testing.assert_array_equal(stored[file][ids], trimmed)
  others = np.setdiff1d(np.arange(config.vocab_size), ids)
  assert stored[file].shape[0] == config.vocab_size
  assert not stored[file][others].any()


@pytest.mark.parametrize("name", TABLES)
def test_a_vocabulary_of_another_size_is_not_saved(tmp_path, name):
  config = with_parts(name)
  ids = np.array([0, 5, 6], np.int32)
  with pytest.raises(WeightsError, match=TABLES[name][2].split(".")[0]):
    weights.save_drafter(
      tmp_path / "d", config, draw(config, columns=4), draft_vocabulary=ids
    )


def test_a_vocabulary_trims_checkpoints_of_other_exporters(tmp_path):
  """Which have a row of every token, none of them zero."""
  config, params = save(tmp_path / "d", "dspark")
  ids = np.array([3, 4, 20], np.int32)
  safetensors.numpy.save_file(
    {"ids": ids}, tmp_path / "d" / "draft_vocabulary.safetensors"
  )
  _, loaded, _ = weights.load_drafter(tmp_path / "d")
  np.testing.assert_array_equal(
    loaded["corrector"]["after"]["kernel"],
    params["corrector"]["after"]["kernel"][:, ids],
  )
  assert loaded["corrector"]["before"].shape == (config.vocab_size, 6)


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "nested", "changes", "named"),
  [
    ("dflash2", {"conv_group_size": 3}, {}, "group_size=3"),
    ("dflash2", {"conv_group_size": None}, {}, "conv_group_size is missing"),
    ("dflash2", {"conv_kernel_size": 0}, {}, "conv_kernel_size"),
    ("dflash2", {"selector_top_k": 30}, {}, "top_k=30"),
    ("dflash2", {"selector_rank": None}, {}, "selector_rank is missing"),
    ("dspark", {"markov_head_type": "fir"}, {}, "markov_head_type='fir'"),
    ("dspark", {"markov_rank": -1}, {}, "markov_rank"),
    ("dspark", {"shift_label": False}, {}, "contradicts itself"),
    ("dspark", {"projector_type": "domino"}, {}, "projector_type='domino'"),
    ("dspark", {"markov_rank": 0}, {}, "sees_token"),
    (
      "dspark",
      dict.fromkeys(("projector_type", "shift_label", "sample_from_anchor")),
      {"architectures": ["DFlashDraftModel"]},
      "sample_from_anchor is missing",
    ),
    ("domino", {"gru_hidden_dim": None}, {}, "gru_hidden_dim is missing"),
    ("domino", {"markov_rank": 4}, {}, "keep one"),
    ("domino", {"pure_draft_prefix_len": -1}, {}, "pure_draft_prefix_len"),
    ("domino", {"projector_type": "jacobi"}, {}, "projector_type='jacobi'"),
  ],
)
def test_parts_that_cannot_be_honoured_are_named(
  tmp_path, name, nested, changes, named
):
  save(tmp_path / "d", name)
  edit(tmp_path / "d", nested=nested, **changes)
  with pytest.raises(WeightsError) as caught:
    weights.read_drafter_config(tmp_path / "d")
  assert named in str(caught.value) and str(tmp_path) in str(caught.value)


# --- Published sizes ----------------------------------------------------------


def test_the_published_dflash2_drafter_has_the_published_parameter_count():
  """Of Qwen3.8-27B, counted without allocating any."""
  config = DrafterConfig(
    num_layers=5,
    width=5120,
    mlp_width=17408,
    num_heads=32,
    num_kv_heads=8,
    head_width=128,
    vocab_size=248320,
    block_size=8,
    mask_token_id=248070,
    target_layer_ids=(5, 19, 33, 47, 61),
    num_target_layers=64,
    target_width=5120,
    layer_windows=(2048,) * 5,
    convolution=Convolution(kernel_size=2, group_size=16),
    selector=Selector(rank=256, top_k=16),
  )
  assert DFlash(config).count_parameters() == 1_924_404_480
