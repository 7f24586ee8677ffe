"""The speculators layout: round trips, and what it or this project refuses."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dflash_jax import weights
from dflash_jax.config import ConfigError, RotaryScaling
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
from tests.weights.test_drafter import CONFIG, assert_same, draw

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
STORED = GOLDENS / "speculators"
CASES = sorted(p.name for p in STORED.iterdir() if p.name != "verifier")
BLOCKS = [name for name in CASES if name != "eagle3"]
RELEASED = sorted(
  str(path.parent.relative_to(GOLDENS))
  for place in ("drafter", "heads", "eagle3/flat")
  for path in (GOLDENS / place).rglob("model.safetensors")
  if path.parent.parent.name != "targets"
)
# What the layout cannot say of the released goldens, and the reason it gives.
UNSAID = {
  "drafter/causal": "layer_causal=",
  "drafter/dflash2_causal": "logit_softcap=9.0",
  "drafter/flat_config": "input_embedding_scale=1.5",
  "drafter/options": "input_embedding_scale=2.5",
} | {name: "DominoDraftModel" for name in RELEASED if "domino" in name}
SERVING = weights.Serving("owner/target", ("Qwen3ForCausalLM",))
WIDE = dataclasses.replace(CONFIG, target_width=CONFIG.width)
IDS = np.array([0, 3, 4, 28], np.int32)


def load(directory, dtype=None):
  """Config, parameters and ids of a drafter of either kind."""
  if weights.drafter_kind(str(directory)) == "eagle3":
    return *weights.load_eagle3(directory, dtype), None
  return weights.load_drafter(directory, dtype)


def save_release(directory, config, params, ids):
  if isinstance(config, DrafterConfig):
    weights.save_drafter(
      directory, config, params, draft_vocabulary=ids, dtype=None
    )
  else:
    weights.save_eagle3(directory, config, params, dtype=None)


def save(directory, config, ids=None, serving=SERVING, dtype="float32"):
  """A drawn block drafter in the layout; its parameters."""
  params = draw(config, columns=None if ids is None else ids.size)
  head = None if ids is None else np.ones((ids.size, config.width), np.float32)
  weights.save_speculators(
    directory,
    config,
    params,
    serving,
    draft_vocabulary=ids,
    head=head,
    dtype=dtype,
  )
  return params


def values_of(directory):
  return json.loads((directory / "config.json").read_text())


def tensors_of(directory):
  return load_file(directory / "model.safetensors")


def assert_same_bytes(one, other):
  first, second = tensors_of(one), tensors_of(other)
  assert first.keys() == second.keys()
  for name, tensor in first.items():
    assert tensor.dtype == second[name].dtype
    assert tensor.tobytes() == second[name].tobytes(), name


def edit(directory, layer=None, **changes):
  """Changes keys of config.json, and of its layer; "absent" removes one."""
  values = values_of(directory)
  place = values["transformer_layer_config"]
  for part, edits in ((values, changes), (place, layer)):
    for key, value in (edits or {}).items():
      if value == "absent":
        part.pop(key, None)
      else:
        part[key] = value
  (directory / "config.json").write_text(json.dumps(values))


@pytest.fixture
def golden(tmp_path):
  """Copies a stored drafter to where it may be damaged."""

  def copy(name):
    shutil.copytree(STORED / name, tmp_path / name)
    return tmp_path / name

  return copy


# --- Round trips --------------------------------------------------------------

# Keys that say nothing of the drafter: the package's code and versions, tokens
# of a text model, settings of training, and a default that layer_types decides.
_NOTHING = {
  "auto_map",
  "transformers_version",
  "bos_token_id",
  "eos_token_id",
  "pad_token_id",
  "use_cache",
  "pretraining_tp",
  "attention_dropout",
  "initializer_range",
  "max_window_layers",
}


def meaning(values):
  """config.json without keys that mean nothing here."""
  return {
    key: meaning(value) if isinstance(value, dict) else value
    for key, value in values.items()
    if key not in _NOTHING
  }


@pytest.mark.parametrize("name", CASES)
def test_what_the_package_wrote_survives_this_project(name, tmp_path):
  source = STORED / name
  config, params, ids = load(source)
  weights.save_speculators(
    tmp_path / "d",
    config,
    params,
    weights.read_speculators_serving(source),
    draft_vocabulary=ids,
    head=weights.read_speculators_head(source) if name != "eagle3" else None,
    dtype=None,
  )
  assert_same_bytes(tmp_path / "d", source)
  assert meaning(values_of(tmp_path / "d")) == meaning(values_of(source))
  assert load(tmp_path / "d")[0] == config


@pytest.mark.parametrize("name", [n for n in RELEASED if n not in UNSAID])
def test_a_released_drafter_survives_the_layout(name, tmp_path):
  source = GOLDENS / name
  config, params, ids = load(source)
  weights.save_speculators(tmp_path / "s", config, params, SERVING, dtype=None)
  again, params, _ = load(tmp_path / "s")
  assert again == config and ids is None
  save_release(tmp_path / "z", again, params, None)
  assert_same_bytes(tmp_path / "z", source)
  assert load(tmp_path / "z")[0] == config


@pytest.mark.parametrize("name", UNSAID)
def test_a_released_drafter_that_the_layout_cannot_say_is_refused(
  name, tmp_path
):
  config, params, _ = load(GOLDENS / name)
  with pytest.raises(WeightsError) as caught:
    weights.save_speculators(tmp_path / "s", config, params, SERVING)
  assert "the speculators layout cannot say" in str(caught.value)
  assert UNSAID[name] in str(caught.value)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", BLOCKS)
def test_the_release_gives_the_package_its_file_back(name, tmp_path):
  """Through the release's layout, which has no place for the head."""
  config, params, ids = load(STORED / name)
  target, _ = weights.load_target(str(STORED / "verifier"))
  config = dataclasses.replace(config, num_target_layers=target.num_layers)
  save_release(tmp_path / "z", config, params, ids)
  config, params, ids = load(tmp_path / "z")
  weights.save_speculators(
    tmp_path / "s",
    config,
    params,
    weights.read_speculators_serving(STORED / name),
    draft_vocabulary=ids,
    head=weights.read_speculators_head(STORED / name),
    dtype=None,
  )
  assert_same_bytes(tmp_path / "s", STORED / name)
  stated = values_of(tmp_path / "s")
  assert stated.pop("num_target_layers") == target.num_layers
  assert meaning(stated) == meaning(values_of(STORED / name))


@pytest.mark.parametrize(
  "changes",
  [
    {"layer_windows": (9, 9, 9), "layer_causal": (True, True, True)},
    {"layer_windows": (9, 0, 9), "layer_causal": (True, False, True)},
    {"layer_windows": (9, 0, 9)},
    {"rotary_scaling": RotaryScaling("yarn", 4.0, 16)},
    {"rotary_scaling": RotaryScaling("llama3", 8.0, 16, 1.5, 5.0)},
    {"anchor_predicts": True},
    {"anchor_predicts": True, **VARIANTS["dflash2"]},
    {"markov": Markov(4), "confidence": Confidence()},
    {"anchor_predicts": True, "confidence": Confidence(False)},
    {"num_target_layers": 0},
    *VARIANTS.values(),
  ],
)
def test_a_config_survives_the_layout(changes, tmp_path):
  config = dataclasses.replace(WIDE, **changes)
  if config.gru:
    pytest.raises(WeightsError, save, tmp_path / "d", config)
    return
  params = save(tmp_path / "d", config)
  found, loaded, ids = weights.load_drafter(tmp_path / "d")
  assert found == config and ids is None
  assert_same(loaded, params)
  assert weights.read_drafter_config(tmp_path / "d") == config


@pytest.mark.parametrize("parts", ["dspark", "dspark gated", None])
def test_a_draft_vocabulary_becomes_maps(parts, tmp_path):
  config = dataclasses.replace(WIDE, **VARIANTS.get(parts, {}))
  params = save(tmp_path / "d", config, IDS)
  found, loaded, ids = weights.load_drafter(tmp_path / "d")
  assert found == config
  np.testing.assert_array_equal(ids, IDS)
  assert_same(loaded, params)
  stored = tensors_of(tmp_path / "d")
  # d2t is how far a token's id lies from its row, not the id.
  assert stored["d2t"].tolist() == [0, 2, 2, 25]
  assert np.flatnonzero(stored["t2d"]).tolist() == IDS.tolist()
  assert stored["lm_head.weight"].shape == (4, 10)
  assert values_of(tmp_path / "d")["draft_vocab_size"] == 4


def test_the_verifier_and_the_drafts_of_a_round_are_named(tmp_path):
  for anchored, drafts in ((False, 4), (True, 5)):
    config = dataclasses.replace(WIDE, anchor_predicts=anchored)
    save(tmp_path / "d", config)
    section = values_of(tmp_path / "d")["speculators_config"]
    (method,) = section["proposal_methods"]
    assert method["speculative_tokens"] == drafts
    assert section["verifier"] == {
      "architectures": ["Qwen3ForCausalLM"],
      "name_or_path": "owner/target",
    }
    found = weights.read_speculators_serving(tmp_path / "d")
    assert found == dataclasses.replace(SERVING, num_drafts=drafts)


# --- The package's defaults ---------------------------------------------------


def test_keys_that_are_missing_take_the_packages_defaults(tmp_path):
  wide = {"width": 32, "target_width": 32, "vocab_size": 300, "block_size": 8}
  absent = ("block_size", "sliding_window_non_causal", "sample_from_anchor")
  cases: dict[str, dict] = {
    "dflash2": {"convolution": Convolution(), "selector": Selector()},
    "dspark": {
      "markov": Markov(),
      "confidence": Confidence(),
      "anchor_predicts": True,
    },
    "dflash": {},
  }
  keys = {
    "dflash2": (
      "conv_kernel_size",
      "conv_group_size",
      "selector_rank",
      "selector_top_k",
    ),
    "dspark": (
      "markov_rank",
      "markov_head_type",
      "enable_confidence_head",
      "confidence_head_with_markov",
    ),
    "dflash": (),
  }
  for kind, parts in cases.items():
    free = kind == "dflash2"
    slides = {"layer_windows": (9, 0, 9), "layer_causal": (not free, False) * 2}
    slides["layer_causal"] = slides["layer_causal"][:3]
    config = dataclasses.replace(WIDE, **wide, **parts, **slides)
    save(tmp_path / kind, config, dtype="bfloat16")
    edit(tmp_path / kind, **dict.fromkeys((*absent, *keys[kind]), "absent"))
    assert weights.read_drafter_config(tmp_path / kind) == config


def test_layers_of_llama_have_heads_and_no_windows_by_default(tmp_path):
  config = dataclasses.replace(WIDE, width=24, target_width=24)
  save(tmp_path / "d", config)
  absent = ("head_dim", "layer_types", "use_sliding_window")
  edit(
    tmp_path / "d",
    layer={"model_type": "llama", "sliding_window": 7}
    | dict.fromkeys(absent, "absent"),
  )
  assert weights.read_drafter_config(tmp_path / "d") == config


def test_a_sliding_layer_without_a_window_is_bidirectional(golden):
  """As the package masks it; the release's layout has it causal."""
  directory = golden("dflash_reduced")
  assert weights.read_drafter_config(directory).layer_causal == (True, False)
  edit(directory, layer={"use_sliding_window": False, "sliding_window": None})
  config = weights.read_drafter_config(directory)
  assert config.layer_windows == (0, 0)
  assert config.layer_causal == (False, False)


def test_keys_that_only_the_release_knows_are_not_read(golden):
  directory = golden("dflash_reduced")
  layer = {"is_causal": False, "causal": False, "shift_label": True}
  edit(directory, layer, is_causal=False, projector_type="domino")
  assert weights.read_drafter_config(directory).layer_causal == (True, False)


def test_a_layer_may_name_the_architecture_it_was_made_from(golden):
  for name in ("eagle3", "dflash"):
    directory = golden(name)
    edit(directory, layer={"architectures": ["LlamaForCausalLM"]})
    assert load(directory)[0] == load(STORED / name)[0]


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_codebooks_are_read_under_either_name(golden, ending):
  directory = golden("dflash2")
  tensors = {
    name + ending if "codebook" in name else name: tensor
    for name, tensor in tensors_of(directory).items()
  }
  save_file(tensors, directory / "model.safetensors")
  assert_same(load(directory)[1], load(STORED / "dflash2")[1])


def test_layers_that_8_bits_leave_out_go_by_the_layouts_names(tmp_path):
  source = STORED / "eagle3"
  config, whole = weights.load_eagle3(source)
  params = weights.quantize_drafter(config, whole)
  params["mlp"]["down"] = whole["mlp"]["down"]
  serving = weights.read_speculators_serving(source)
  weights.save_speculators(
    tmp_path / "d", config, params, serving, dtype="float32"
  )
  stated = values_of(tmp_path / "d")["quantization_config"]["ignore"]
  assert stated == ["layers.0.mlp.down_proj", "lm_head"]
  found, loaded = weights.load_eagle3(tmp_path / "d")
  assert found == config
  assert_same(loaded, params)


def test_copies_of_the_targets_tensors_do_not_matter(golden):
  directory = golden("dspark_bonus")
  table = np.full((53, 24), 3.0, np.float32)
  copies = {
    "embed_tokens.weight": table,
    "lm_head.weight": table,
    "verifier_lm_head.weight": table,
    "verifier_norm.weight": table[0],
  }
  path = directory / "model.safetensors"
  save_file(tensors_of(directory) | copies, path)
  assert_same(load(directory)[1], load(STORED / "dspark_bonus")[1])


# --- Targets ------------------------------------------------------------------


def test_a_depth_that_no_one_states_leaves_taps_to_the_target():
  config = weights.read_drafter_config(STORED / "dflash")
  assert config.num_target_layers == 0
  assert config.target_layer_ids == (0, 4, 2)  # enters 1, 5, 3
  target = weights.read_target_config(STORED / "verifier")
  config.check_target(target)
  with pytest.raises(ConfigError, match=r"tap 4 is outside .* 0\.\.\.3"):
    config.check_target(dataclasses.replace(target, num_layers=4))


def test_a_depth_that_no_one_states_is_not_written_as_a_release(tmp_path):
  config, params, _ = load(STORED / "dflash")
  with pytest.raises(WeightsError, match=r"num_target_layers .*--verifier"):
    weights.save_drafter(tmp_path / "d", config, params)
  assert not list(tmp_path.iterdir())


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"gru": Gru(3, 2)}, "DominoDraftModel"),
    ({"convolution": Convolution(2, 5)}, "DFlashMixedDraftModel"),
    ({"selector": Selector(4, 5)}, "DFlashMixedDraftModel"),
    ({"layer_windows": (9, 0, 5), "layer_causal": (True, False, True)}, "one"),
    (
      {"layer_windows": (9, 0, 9), "layer_causal": (False, True, False)},
      "alik",
    ),
    (
      {"layer_windows": (9, 0, 9), "layer_causal": (True, False, False)},
      "alik",
    ),
    ({"layer_causal": (True, True, True)}, "bidirectional"),
    ({"logit_softcap": 30.0}, "logit_softcap=30.0"),
    ({"output_multiplier": 0.5}, "output_multiplier=0.5"),
    ({"input_embedding_scale": 2.0}, "input_embedding_scale=2.0"),
    ({"target_width": 11}, "width=10 for a target of 11"),
    ({"markov": Markov(4, "rnn")}, "passes the anchor's slot"),
    (
      {"convolution": Convolution(6, 2), "selector": Selector(4, 5)},
      "convolution.kernel_size=6 in blocks of 5",
    ),
  ],
)
def test_what_the_layout_cannot_say_is_refused(changes, named, tmp_path):
  with pytest.raises(WeightsError, match="speculators layout") as caught:
    save(tmp_path / "d", dataclasses.replace(WIDE, **changes))
  assert named in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_a_selector_takes_the_whole_vocabulary(golden, tmp_path):
  config = dataclasses.replace(WIDE, **VARIANTS["dflash2"])
  with pytest.raises(WeightsError, match="all 29 tokens"):
    save(tmp_path / "d", config, IDS)
  directory = golden("dflash2")
  edit(directory, draft_vocab_size=31)
  with pytest.raises(WeightsError, match="draft_vocab_size=31"):
    load(directory)


def test_a_file_without_a_verifier_or_head_is_not_written(tmp_path):
  with pytest.raises(WeightsError, match="--verifier"):
    save(tmp_path / "d", WIDE, serving=weights.Serving())
  with pytest.raises(WeightsError, match=r"\(4, 10\).*--verifier"):
    weights.save_speculators(
      tmp_path / "d", WIDE, draw(WIDE), SERVING, draft_vocabulary=IDS
    )
  with pytest.raises(WeightsError, match="drafts 4"):
    save(tmp_path / "d", WIDE, serving=weights.Serving("a/b", (), 5))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("name", "changes", "layer", "named"),
  [
    ("dflash", {"speculators_model_type": "peagle"}, {}, "dflash, dflash2"),
    ("dflash", {"aux_hidden_state_layer_ids": [0, 5, 3]}, {}, "ids from 1"),
    ("dflash", {"aux_hidden_state_layer_ids": None}, {}, "aux_hidden_state"),
    ("dflash", {"mask_token_id": None}, {}, "mask_token_id is missing"),
    ("dflash", {"draft_vocab_size": 54}, {}, "draft_vocab_size=54"),
    ("dflash", {"draft_vocab_size": 31}, {}, "d2t is missing"),
    ("dflash", {"final_logit_softcapping": 3.0}, {}, "final_logit_softcap"),
    ("dflash", {"dflash_config": {"output_multiplier": 2}}, {}, "output_mul"),
    ("dflash", {}, {"input_embedding_scale": 2.0}, "input_embedding_scale"),
    ("dflash", {}, {"model_type": "gpt_oss"}, "model_type='gpt_oss'"),
    ("dflash", {}, {"attention_bias": True}, "attention_bias"),
    ("dflash", {}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("dspark", {"markov_head_type": "lstm"}, {}, "markov_head_type='lstm'"),
    ("dspark", {"markov_rank": 0}, {}, "confidence.sees_token"),
    ("dspark_rnn", {"sample_from_anchor": False}, {}, "anchor's slot"),
    ("eagle3", {"fc_norm": True}, {}, "fc_norm"),
    ("eagle3", {"norm_before_fc": True}, {}, "norm_before_fc"),
    ("eagle3", {"norm_output": True}, {}, "norm_output"),
    ("eagle3", {}, {"num_hidden_layers": 2}, "num_hidden_layers"),
    ("eagle3", {}, {"layer_types": ["sliding_attention"]}, "layer_types"),
  ],
)
def test_settings_that_cannot_be_honoured_are_named(
  golden, name, changes, layer, named
):
  directory = golden(name)
  edit(directory, layer, **changes)
  with pytest.raises(WeightsError) as caught:
    load(directory)
  assert named in str(caught.value) and str(directory) in str(caught.value)


@pytest.mark.parametrize(
  ("name", "method", "named"),
  [
    ("dflash", {"verifier_accept_k": 5}, "proposal_methods"),
    ("eagle3", {"proposal_type": "tree"}, "proposal_methods"),
    ("eagle3", {"speculative_tokens": "3"}, "speculative_tokens"),
  ],
)
def test_another_way_to_propose_is_named_when_written_on(
  golden, name, method, named
):
  directory = golden(name)
  section = values_of(directory)["speculators_config"]
  section["proposal_methods"][0] |= method
  edit(directory, speculators_config=section)
  load(directory)  # the network is what it was
  with pytest.raises(WeightsError, match=named):
    weights.read_speculators_serving(directory)


@pytest.mark.parametrize("fault", ["ids", "unsorted", "t2d", "missing"])
def test_maps_that_cannot_be_are_named(golden, fault):
  directory = golden("dspark")
  tensors = tensors_of(directory)
  offsets = tensors["d2t"]
  match fault:
    case "ids":  # in place of how far they lie from their rows
      tensors["d2t"] = offsets + np.arange(len(offsets))
    case "unsorted":
      rows = np.arange(len(offsets))
      tensors["d2t"] = (offsets + rows)[::-1] - rows
    case "t2d":
      tensors["t2d"] = np.roll(tensors["t2d"], 1)
    case "missing":
      del tensors["d2t"]
  save_file(tensors, directory / "model.safetensors")
  with pytest.raises(WeightsError, match="d2t"):
    load(directory)


@pytest.mark.parametrize("fault", ["missing", "spare", "shape"])
def test_a_tensor_that_does_not_fit_is_named(golden, fault):
  directory = golden("dspark_bonus")
  tensors = tensors_of(directory)
  name = "layers.1.self_attn.k_norm.weight"
  match fault:
    case "missing":
      del tensors[name]
    case "spare":
      name = "input_norm.weight"
      tensors[name] = np.ones(5, np.float32)
    case "shape":
      tensors[name] = np.ones(7, np.float32)
  save_file(tensors, directory / "model.safetensors")
  with pytest.raises(WeightsError) as caught:
    load(directory)
  assert name in str(caught.value) and str(directory) in str(caught.value)


def test_eagle3_is_not_loaded_as_blocks_nor_the_reverse():
  with pytest.raises(WeightsError, match="speculators_model_type='eagle3'"):
    weights.load_drafter(STORED / "eagle3")
  with pytest.raises(WeightsError, match="architectures"):
    weights.load_eagle3(STORED / "dflash")
