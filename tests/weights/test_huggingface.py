"""Targets in Hugging Face layout: read exactly, or refused by name."""

import json
import pathlib
import struct

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from dflash_jax import weights
from dflash_jax.config import RotaryScaling
from dflash_jax.weights import huggingface, safetensors_file
from dflash_jax.weights.names import WeightsError
from dflash_jax.weights.target_names import target_table

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "targets"

CONFIG = {
  "model_type": "llama",
  "hidden_size": 10,
  "intermediate_size": 13,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "num_key_value_heads": 1,
  "head_dim": 6,
  "vocab_size": 29,
  "rms_norm_eps": 1e-5,
  "max_position_embeddings": 128,
  "rope_theta": 500.0,
  "tie_word_embeddings": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}


def draw(config, dtype=np.float32, seed=0):
  """Random tensors for a config, by their names in the file."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=row.shape).astype(dtype)
    for name, row in target_table(config).items()
  }


def write_config(directory, **changes):
  directory.mkdir(exist_ok=True)
  values = {k: v for k, v in (CONFIG | changes).items() if v != "absent"}
  (directory / "config.json").write_text(json.dumps(values))
  return directory


@pytest.fixture
def checkpoint(tmp_path):
  """A small sound checkpoint: its directory and its tensors."""
  directory = write_config(tmp_path / "target")
  tensors = draw(weights.read_target_config(directory))
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  return directory, tensors


def read(tmp_path, **changes):
  return weights.read_target_config(write_config(tmp_path / "c", **changes))


def raw_file(header, body=b""):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + body


# --- What is read -------------------------------------------------------------


def test_every_setting_reaches_the_config(tmp_path):
  config = read(tmp_path, eos_token_id=[2, 7])
  assert (config.num_layers, config.width, config.mlp_width) == (2, 10, 13)
  assert (config.num_heads, config.num_kv_heads, config.head_width) == (3, 1, 6)
  assert (config.vocab_size, config.max_length) == (29, 128)
  assert (config.norm_epsilon, config.rotary_base) == (1e-5, 500.0)
  assert config.rotary_scaling is None and config.eos_ids == (2, 7)
  assert not (config.tied_head or config.qkv_bias or config.qk_norm)


def test_tensors_land_where_their_names_say(checkpoint):
  directory, tensors = checkpoint
  _, params = weights.load_target(str(directory))
  layer = params["layers"][1]
  places = {
    "model.embed_tokens.weight": params["embedding"],
    "lm_head.weight": params["head"]["kernel"].T,
    "model.norm.weight": params["norm"]["scale"],
    "model.layers.1.input_layernorm.weight": layer["attention_norm"]["scale"],
    "model.layers.1.post_attention_layernorm.weight": layer["mlp_norm"][
      "scale"
    ],
    "model.layers.1.self_attn.q_proj.weight": layer["attention"]["query"][
      "kernel"
    ].T,
    "model.layers.1.self_attn.k_proj.weight": layer["attention"]["key"][
      "kernel"
    ].T,
    "model.layers.1.self_attn.v_proj.weight": layer["attention"]["value"][
      "kernel"
    ].T,
    "model.layers.1.self_attn.o_proj.weight": layer["attention"]["output"][
      "kernel"
    ].T,
    "model.layers.1.mlp.gate_proj.weight": layer["mlp"]["gate"]["kernel"].T,
    "model.layers.1.mlp.up_proj.weight": layer["mlp"]["up"]["kernel"].T,
    "model.layers.1.mlp.down_proj.weight": layer["mlp"]["down"]["kernel"].T,
  }
  for name, parameter in places.items():
    np.testing.assert_array_equal(np.asarray(parameter), tensors[name], name)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_files_are_read(tmp_path, stored, dtype):
  directory = write_config(tmp_path / "half")
  config = weights.read_target_config(directory)
  tensors = draw(config, stored)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  _, params = weights.load_target(str(directory), dtype)
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
  expected = tensors["lm_head.weight"].astype(np.float32).astype(dtype)
  np.testing.assert_array_equal(
    np.asarray(params["head"]["kernel"].T), expected
  )


@pytest.mark.parametrize(
  "case", sorted(path.name for path in GOLDENS.glob("*"))
)
def test_checkpoints_that_transformers_wrote_are_read(case, tmp_path):
  directory = GOLDENS / case
  config, params = weights.load_target(str(directory))
  tensors: dict[str, np.ndarray] = {}
  for path in directory.glob("model*.safetensors"):
    tensors |= safetensors.numpy.load_file(path)
  # Experts lie apart or fused in files, and a vision tower is left there.
  if config.experts is None and not any("vision" in name for name in tensors):
    assert len(jax.tree.leaves(params)) == len(tensors) + config.tied_head
  ending = "model.layers.1.self_attn.k_proj.weight"
  (name,) = (name for name in tensors if name.endswith(ending))
  np.testing.assert_array_equal(
    np.asarray(params["layers"][1]["attention"]["key"]["kernel"].T),
    tensors[name].astype(np.float32),
  )
  # The same model's config, as older releases of transformers spell it.
  older = tmp_path / "config.json"
  older.write_bytes((directory / "config_hub.json").read_bytes())
  assert weights.read_target_config(tmp_path) == config


def test_shards_are_read_as_one_checkpoint(checkpoint):
  directory, tensors = checkpoint
  _, whole = weights.load_target(str(directory))
  (directory / "model.safetensors").unlink()
  split_into_shards(directory, tensors)
  _, sharded = weights.load_target(str(directory))
  jax.tree.map(np.testing.assert_array_equal, whole, sharded)


def split_into_shards(directory, tensors, count=3):
  """Writes shards and their index; returns the index."""
  weight_map: dict[str, str] = {}
  for i in range(count):
    name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
    part = {key: tensors[key] for key in sorted(tensors)[i::count]}
    safetensors.numpy.save_file(part, directory / name)
    weight_map |= dict.fromkeys(part, name)
  index = {"metadata": {}, "weight_map": weight_map}
  path = directory / "model.safetensors.index.json"
  path.write_text(json.dumps(index))
  return index


@pytest.mark.parametrize(
  ("changes", "base", "scaling"),
  [
    ({"rope_theta": "absent"}, 10000.0, None),
    ({"rope_scaling": None, "rope_theta": 7}, 7.0, None),
    ({"rope_scaling": {"type": "default"}}, 500.0, None),
    (
      {
        "rope_theta": "absent",
        "rope_parameters": {"rope_type": "default", "rope_theta": 9.0},
      },
      9.0,
      None,
    ),
    (
      {"rope_scaling": YARN | {"original_max_position_embeddings": 32}},
      500.0,
      RotaryScaling("yarn", 4.0, 32),
    ),
    ({"rope_scaling": YARN}, 500.0, RotaryScaling("yarn", 4.0, 128)),
    (
      {
        "rope_scaling": YARN
        | {
          "beta_fast": 16,
          "beta_slow": 2.0,
          "attention_factor": 1.5,
          "truncate": False,
        }
      },
      500.0,
      RotaryScaling(
        "yarn",
        4.0,
        128,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.5,
        truncate=False,
      ),
    ),
    (
      {"rope_scaling": {"type": "linear", "factor": 2}},
      500.0,
      RotaryScaling("linear", 2.0),
    ),
    (
      {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}},
      500.0,
      RotaryScaling("llama3", 8.0, 32, 1.0, 4.0),
    ),
  ],
)
def test_rotary_is_read_in_either_spelling(tmp_path, changes, base, scaling):
  config = read(tmp_path, **changes)
  assert (config.rotary_base, config.rotary_scaling) == (base, scaling)


@pytest.mark.parametrize(
  ("family", "head_dim", "expected"),
  [
    ("llama", 6, 6),
    ("llama", None, 4),
    ("qwen2", None, 4),
    ("qwen3", None, 128),
  ],
)
def test_head_width_falls_back_as_in_transformers(
  tmp_path, family, head_dim, expected
):
  config = read(tmp_path, model_type=family, hidden_size=12, head_dim=head_dim)
  assert config.head_width == expected


def test_end_tokens_come_from_both_files_once(tmp_path):
  directory = write_config(tmp_path / "c", eos_token_id=5)
  text = json.dumps({"eos_token_id": [5, 11]})
  (directory / "generation_config.json").write_text(text)
  assert weights.read_target_config(directory).eos_ids == (5, 11)


def test_a_tied_head_is_the_embedding_transposed(tmp_path):
  directory = write_config(tmp_path / "tied", tie_word_embeddings=True)
  config = weights.read_target_config(directory)
  tensors = draw(config)
  assert "lm_head.weight" not in tensors
  # Some exporters store the shared matrix under both names.
  copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
  for extra in ({}, copy):
    path = directory / "model.safetensors"
    safetensors.numpy.save_file(tensors | extra, path)
    _, params = weights.load_target(str(directory))
    np.testing.assert_array_equal(
      np.asarray(params["head"]["kernel"]),
      tensors["model.embed_tokens.weight"].T,
    )


def test_a_head_that_is_not_the_embedding_cannot_be_tied(tmp_path):
  directory = write_config(tmp_path / "tied", tie_word_embeddings=True)
  tensors = draw(weights.read_target_config(directory))
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  with pytest.raises(WeightsError, match=r"lm_head\.weight differs"):
    weights.load_target(str(directory))


def test_rotary_buffers_of_old_exporters_are_ignored(checkpoint):
  directory, tensors = checkpoint
  name = "model.layers.0.self_attn.rotary_emb.inv_freq"
  safetensors.numpy.save_file(
    tensors | {name: np.ones(3, np.float64)}, directory / "model.safetensors"
  )
  weights.load_target(str(directory))


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model_type": "mistral"}, "mistral"),
    ({"model_type": "absent"}, "model_type is missing"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (
      {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
      "partial_rotary_factor",
    ),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
    ({"rope_scaling": YARN | {"mscale": 1.0}}, "mscale"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 5.0}}, "low_freq_factor"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_parameters": {"rope_theta": 3.0}}, "rope_theta is 500.0"),
    (
      {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
      "full_attention",
    ),
    (
      {"model_type": "qwen2", "layer_types": ["full_attention", "chunked"]},
      "chunked",
    ),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
    ({"hidden_size": "absent"}, "hidden_size is missing"),
    ({"hidden_size": "ten"}, "hidden_size"),
    ({"hidden_size": -10}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"num_hidden_layers": 10**15}, "num_hidden_layers"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_key_value_heads": 2}, "num_kv_heads=2"),
    ({"head_dim": 5}, "head_width=5"),
    ({"head_dim": None}, "head_dim"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"eos_token_id": 29}, "eos_token_id"),
    ({"eos_token_id": [1, -1]}, "eos_token_id"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
  ],
)
def test_settings_that_cannot_be_honoured_are_named(tmp_path, changes, named):
  with pytest.raises(WeightsError) as caught:
    read(tmp_path, **changes)
  assert named in str(caught.value)
  assert "config.json" in str(caught.value)


def test_sliding_windows_that_are_off_or_never_reached_are_accepted(tmp_path):
  off = {"use_sliding_window": False, "sliding_window": 64}
  wide = {"use_sliding_window": True, "sliding_window": 128}
  for changes in (off, wide | {"max_window_layers": 0}):
    config = read(tmp_path, model_type="qwen2", **changes)
    assert config.qkv_bias and config.layer_windows == ()


def test_a_source_that_is_nothing_is_named(tmp_path):
  for source in (tmp_path / "absent", "no such place", "a/b/c", "../x/y"):
    with pytest.raises(WeightsError, match="neither a directory nor a hub id"):
      weights.load_target(str(source))


def test_an_unreachable_hub_says_what_to_fetch_and_how(monkeypatch):
  def refuse(repository, **_):
    raise OSError("Name or service not known")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
  with pytest.raises(WeightsError, match="hf download some/model --local-dir"):
    weights.load_target("some/model")


def test_a_hub_id_is_fetched_without_code_or_pickles(monkeypatch, checkpoint):
  directory, _ = checkpoint
  asked = {}

  def fetch(repository, *, allow_patterns):
    asked[repository] = allow_patterns
    return str(directory)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
  config, _ = weights.load_target("some/model")
  assert config.width == 10
  assert not {"*", "*.py", "*.bin", "*.pt"} & set(asked["some/model"])


# --- Damaged files ------------------------------------------------------------


def test_a_config_cut_anywhere_is_named(checkpoint):
  directory, _ = checkpoint
  path = directory / "config.json"
  text = path.read_bytes()
  for length in range(len(text)):
    path.write_bytes(text[:length])
    with pytest.raises(WeightsError, match=r"config\.json"):
      weights.load_target(str(directory))


def test_a_changed_config_byte_is_named_or_harmless(tmp_path):
  directory = write_config(
    tmp_path / "c",
    rope_scaling=YARN,
    eos_token_id=[2, 7],
    layer_types=["full_attention"] * 2,
  )
  path = directory / "config.json"
  data = path.read_bytes()
  rng = np.random.default_rng(0)
  for place in rng.integers(0, len(data), 400):
    changed = bytearray(data)
    changed[place] = rng.choice(list(b'0159-e."[]{}, n'))
    path.write_bytes(changed)
    try:
      weights.read_target_config(directory)
    except WeightsError as error:
      assert "config.json" in str(error)


@pytest.mark.parametrize("text", [b"[1]", b"3", b"[" * 100_000, b"\xff\xfe{"])
def test_a_config_that_is_no_object_is_named(checkpoint, text):
  directory, _ = checkpoint
  (directory / "config.json").write_bytes(text)
  with pytest.raises(WeightsError, match=r"config\.json"):
    weights.load_target(str(directory))


def test_weights_cut_anywhere_are_named(checkpoint):
  directory, _ = checkpoint
  path = directory / "model.safetensors"
  data = path.read_bytes()
  lengths = [*range(0, 40), *range(40, len(data), 37), len(data) - 1]
  for length in lengths:
    path.write_bytes(data[:length])
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
      weights.load_target(str(directory))


def test_weights_with_bytes_too_many_are_named(checkpoint):
  directory, _ = checkpoint
  path = directory / "model.safetensors"
  path.write_bytes(path.read_bytes() + b"\0")
  with pytest.raises(WeightsError, match=r"model\.safetensors.*data bytes"):
    weights.load_target(str(directory))


def test_a_changed_header_byte_is_named_or_harmless(checkpoint):
  directory, _ = checkpoint
  path = directory / "model.safetensors"
  data = bytearray(path.read_bytes())
  length = 8 + struct.unpack("<Q", data[:8])[0]
  rng = np.random.default_rng(0)
  for place in [*range(8), *rng.integers(8, length, 300)]:
    changed = bytearray(data)
    changed[place] = (changed[place] + rng.integers(1, 256)) % 256
    path.write_bytes(changed)
    try:
      weights.load_target(str(directory))
    except WeightsError as error:
      assert str(directory) in str(error)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 100_000_001, 9999])
def test_a_huge_header_length_is_named(tmp_path, length):
  path = tmp_path / "model.safetensors"
  path.write_bytes(struct.pack("<Q", length) + b"{}" * 50)
  with pytest.raises(WeightsError, match=f"claims {length} bytes"):
    safetensors_file.read_safetensors(path)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
  ("header", "size", "named"),
  [
    ([], 0, "no table"),
    (b"null", 0, "no table"),
    (b"[" * 5000, 0, "not sound JSON"),
    (b'{"a": 1' + b"0" * 5000 + b"}", 0, "not sound JSON"),
    (b'{"a":{},"a":{}}', 0, "twice"),
    (b"\xff{}", 0, "not sound JSON"),
    ({"a": 3}, 8, "tensor a"),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "tensor a"),
    ({"a": entry(shape=[-2])}, 8, "tensor a"),
    ({"a": entry(shape=[2.0])}, 8, "tensor a"),
    ({"a": entry(offsets=[0, 4, 8])}, 8, "tensor a"),
    ({"a": entry(offsets=[8, 0])}, 8, "tensor a"),
    ({"a": entry(shape=[3])}, 8, "tensor a"),
    ({"a": entry(shape=[2**62, 2**62])}, 8, "tensor a"),
    ({"a": entry(dtype="F5")}, 8, "F5"),
    ({"a": entry(dtype=[1])}, 8, "tensor a"),
    ({"a": entry(offsets=[8, 16])}, 16, "gap"),
    ({"a": entry(), "b": entry(offsets=[4, 12])}, 12, "overlap"),
    ({"a": entry(), "b": entry()}, 8, "overlap"),
    ({"a": entry()}, 12, "fill 8 bytes"),
  ],
)
def test_a_header_that_lies_is_named(tmp_path, header, size, named):
  path = tmp_path / "model.safetensors"
  path.write_bytes(raw_file(header, bytes(size)))
  with pytest.raises(WeightsError) as caught:
    safetensors_file.read_safetensors(path)
  assert named in str(caught.value) and str(path) in str(caught.value)


def test_empty_tensors_are_sound(tmp_path):
  path = tmp_path / "model.safetensors"
  header = {"b": entry(shape=[0, 3], offsets=[0, 0]), "a": entry()}
  path.write_bytes(raw_file(header, bytes(8)))
  tensors = safetensors_file.read_safetensors(path)
  assert tensors["b"].view().shape == (0, 3)


@pytest.mark.parametrize("fault", ["missing", "spare", "shape", "dtype"])
def test_a_tensor_that_does_not_fit_is_named(checkpoint, fault):
  directory, tensors = checkpoint
  name = "model.layers.1.mlp.up_proj.weight"
  match fault:
    case "missing":
      del tensors[name]
    case "spare":
      name = "model.layers.2.mlp.up_proj.weight"
      tensors[name] = np.ones((3, 5), np.float32)
    case "shape":
      tensors[name] = tensors[name].T.copy()
    case "dtype":
      tensors[name] = tensors[name].astype(np.int32)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  with pytest.raises(WeightsError) as caught:
    weights.load_target(str(directory))
  assert name in str(caught.value) and str(directory) in str(caught.value)


def test_a_directory_without_weights_is_named(tmp_path):
  directory = write_config(tmp_path / "empty")
  (directory / "pytorch_model.bin").write_bytes(b"pickle")
  with pytest.raises(WeightsError, match="only safetensors are read"):
    weights.load_target(str(directory))


def test_an_index_that_does_not_fit_its_shards_is_named(checkpoint):
  directory, tensors = checkpoint
  (directory / "model.safetensors").unlink()
  path = directory / "model.safetensors.index.json"
  index = split_into_shards(directory, tensors)
  shards = sorted(set(index["weight_map"].values()))
  name = "model.norm.weight"
  other = next(s for s in shards if s != index["weight_map"][name])
  for weight_map, named in [
    (index["weight_map"] | {name: other}, name),
    (index["weight_map"] | {"model.absent": other}, "model.absent"),
    (index["weight_map"] | {name: "gone.safetensors"}, "gone.safetensors"),
    (index["weight_map"] | {name: "../model.safetensors"}, "weight_map"),
    (index["weight_map"] | {name: 3}, "weight_map"),
    (None, "weight_map"),
  ]:
    path.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=named):
      weights.load_target(str(directory))


def test_a_tensor_in_two_shards_is_named(checkpoint):
  directory, tensors = checkpoint
  (directory / "model.safetensors").unlink()
  index = split_into_shards(directory, tensors)
  name = "model.norm.weight"
  other = next(
    s for s in index["weight_map"].values() if s != index["weight_map"][name]
  )
  part = safetensors.numpy.load_file(directory / other)
  safetensors.numpy.save_file(part | {name: tensors[name]}, directory / other)
  with pytest.raises(WeightsError, match=r"model\.norm\.weight is also in"):
    weights.load_target(str(directory))


def test_a_shard_whose_copy_was_cut_short_is_named(checkpoint):
  directory, tensors = checkpoint
  (directory / "model.safetensors").unlink()
  split_into_shards(directory, tensors)
  shard = directory / "model-00002-of-00003.safetensors"
  shard.write_bytes(shard.read_bytes()[:-100])
  with pytest.raises(WeightsError, match="model-00002-of-00003"):
    weights.load_target(str(directory))


def test_a_directory_is_read_with_either_path_type(checkpoint):
  directory, _ = checkpoint
  assert huggingface.load_target(directory)[0].width == 10
