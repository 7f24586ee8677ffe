"""What each family's config.json and files say, and what none here can do."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from dflash_jax import weights
from dflash_jax.config import RotaryScaling, TargetConfig
from dflash_jax.target_network import Experts, Gate
from dflash_jax.weights.names import WeightsError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "targets"
CASES = (
  "qwen2_window",
  "qwen3_moe",
  "qwen3_moe_sharded",
  "gpt_oss",
  "gpt_oss_mxfp4",
  "gemma3",
  "gemma3_vision",
)
EXPECTED = {
  "qwen2_window": dict(family="qwen2", qkv_bias=True, layer_windows=(0, 5, 5)),
  "qwen3_moe": dict(
    family="qwen3_moe",
    qk_norm=True,
    layer_windows=(),
    experts=Experts(7, 3, 14, dense_layers=(1,)),
  ),
  "qwen3_moe_sharded": dict(
    experts=Experts(7, 3, 14, renormalize=False, dense_layers=(0, 2)),
  ),
  "gpt_oss": dict(
    family="gpt_oss",
    qkv_bias=True,
    output_bias=True,
    attention_sinks=True,
    layer_windows=(5, 0, 5, 0),
    gate=Gate("clamped", 1.702, 1.5),
    experts=Experts(5, 2, 22, bias=True),
    rotary_scaling=RotaryScaling("yarn", 4.0, 32, truncate=False),
  ),
  "gpt_oss_mxfp4": dict(gate=Gate("clamped", 1.702, 2.0)),
  "gemma3": dict(
    family="gemma3_text",
    qk_norm=True,
    unit_offset=True,
    post_norms=True,
    tied_head=True,
    layer_windows=(5, 5, 5, 5, 5, 0, 5),
    rotary_base=1000.0,
    rotary_scaling=RotaryScaling("linear", 8.0),
    local_rotary_base=30.0,
    score_scale=19**-0.5,
    gate=Gate("gelu_tanh"),
    embedding_scale=24**0.5,
    eos_ids=(2,),
  ),
  "gemma3_vision": dict(
    layer_windows=(4, 4, 4, 4, 4, 0, 4), score_scale=None, eos_ids=(2, 5)
  ),
}
# What google publishes of Gemma 3 4B, and nothing else.
GEMMA3_4B = {
  "architectures": ["Gemma3ForConditionalGeneration"],
  "eos_token_id": [1, 106],
  "model_type": "gemma3",
  "text_config": {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "model_type": "gemma3_text",
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
  },
  "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def write(directory, config):
  directory.mkdir(exist_ok=True)
  (directory / "config.json").write_text(json.dumps(config))
  return directory


def stated(case, **changes):
  """A golden's config.json, changed; of a nested one, its text part."""
  config = json.loads((GOLDENS / case / "config.json").read_text())
  part = config.get("text_config", config)
  part |= changes
  return config


def read_tensors(directory):
  tensors: dict[str, np.ndarray] = {}
  for path in directory.glob("model*.safetensors"):
    tensors |= safetensors.numpy.load_file(path)
  return tensors


# --- config.json --------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spelling", ["config.json", "config_hub.json"])
def test_every_setting_reaches_the_config(case, spelling, tmp_path):
  shutil.copy(GOLDENS / case / spelling, tmp_path / "config.json")
  config = weights.read_target_config(tmp_path)
  for name, value in EXPECTED[case].items():
    assert getattr(config, name) == value, name


def test_what_gemmas_config_leaves_out_is_what_transformers_takes(tmp_path):
  config = weights.read_target_config(write(tmp_path / "c", GEMMA3_4B))
  kinds = tuple(0 if (i + 1) % 6 == 0 else 1024 for i in range(34))
  assert config == TargetConfig(
    family="gemma3_text",
    num_layers=34,
    width=2560,
    mlp_width=10240,
    num_heads=8,
    num_kv_heads=4,
    head_width=256,
    vocab_size=262208,
    norm_epsilon=1e-6,
    rotary_base=1e6,
    rotary_scaling=RotaryScaling("linear", 8.0),
    qk_norm=True,
    tied_head=True,
    max_length=131072,
    eos_ids=(1, 106),
    layer_windows=kinds,
    local_rotary_base=1e4,
    gate=Gate("gelu_tanh"),
    unit_offset=True,
    post_norms=True,
    embedding_scale=2560**0.5,
  )


@pytest.mark.parametrize(
  ("case", "changes", "named"),
  [
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
    ("gemma3", {"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
    ("gemma3", {"attention_bias": True}, "attention_bias"),
    ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
    ("gemma3", {"rope_parameters": [1]}, "rope_parameters"),
    (
      "gemma3",
      {
        "rope_parameters": {
          "full_attention": {"rope_theta": 9.0},
          "sliding_attention": {"rope_type": "linear", "factor": 2.0},
        }
      },
      "sliding_attention",
    ),
    ("gemma3_vision", {"hidden_activation": "relu"}, "text_config"),
    ("gpt_oss", {"attention_bias": False}, "attention_bias=False"),
    ("gpt_oss", {"num_local_experts": None}, "num_local_experts is missing"),
    ("gpt_oss", {"num_experts_per_tok": 6}, "top_k=6"),
    ("gpt_oss", {"swiglu_limit": -1.0}, "swiglu_limit"),
    ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types"),
    ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ("gpt_oss", {"quantization_config": 3}, "quantization_config"),
    ("qwen3_moe", {"num_local_experts": 0}, "num_local_experts is 0"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ("qwen3_moe", {"mlp_only_layers": [1.5]}, "mlp_only_layers"),
    ("qwen3_moe", {"quantization_config": {}}, "quantization_config"),
    ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act"),
    ("gemma3", {"model_type": "gemma2"}, "gemma2"),
    ("qwen3_moe", {"model_type": "qwen2_moe"}, "qwen2_moe"),
  ],
)
def test_settings_that_cannot_be_honoured_are_named(
  tmp_path, case, changes, named
):
  directory = write(tmp_path / "c", stated(case, **changes))
  with pytest.raises(WeightsError) as caught:
    weights.read_target_config(directory)
  assert named in str(caught.value) and "config.json" in str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_a_changed_config_byte_is_named_or_harmless(case, tmp_path):
  data = (GOLDENS / case / "config_hub.json").read_bytes()
  rng = np.random.default_rng(0)
  for place in rng.integers(0, len(data), 150):
    changed = bytearray(data)
    changed[place] = rng.choice(list(b'0159-e."[]{}, n'))
    (tmp_path / "config.json").write_bytes(changed)
    try:
      weights.read_target_config(tmp_path)
    except WeightsError as error:
      assert "config.json" in str(error)


# --- Tensors ------------------------------------------------------------------


def test_each_expert_lands_in_its_place():
  _, params = weights.load_target(str(GOLDENS / "qwen3_moe"))
  tensors = read_tensors(GOLDENS / "qwen3_moe")
  mlp = params["layers"][2]["mlp"]
  np.testing.assert_array_equal(
    np.asarray(mlp["router"]["kernel"]).T,
    tensors["model.layers.2.mlp.gate.weight"],
  )
  for matrix in ("gate", "up", "down"):
    kernel = np.asarray(mlp[matrix]["kernel"])
    assert len(kernel) == 7
    for expert in range(7):
      name = f"model.layers.2.mlp.experts.{expert}.{matrix}_proj.weight"
      np.testing.assert_array_equal(kernel[expert].T, tensors[name])
  dense = params["layers"][1]["mlp"]
  np.testing.assert_array_equal(
    np.asarray(dense["up"]["kernel"]).T,
    tensors["model.layers.1.mlp.up_proj.weight"],
  )


def test_columns_of_gate_and_up_take_turns():
  _, params = weights.load_target(str(GOLDENS / "gpt_oss"))
  tensors = read_tensors(GOLDENS / "gpt_oss")
  mlp, prefix = params["layers"][3]["mlp"], "model.layers.3.mlp.experts."
  for start, matrix in enumerate(("gate", "up")):
    for part, ending in (("kernel", ""), ("bias", "_bias")):
      np.testing.assert_array_equal(
        np.asarray(mlp[matrix][part]),
        tensors[f"{prefix}gate_up_proj{ending}"][..., start::2],
      )


def respell(name):
  """The names that releases of transformers since 4.52 give them."""
  text = "language_model.model."
  if name.startswith(text):
    return "model.language_model." + name.removeprefix(text)
  return "model." + name


def test_a_text_model_beside_a_vision_tower_has_either_prefix(tmp_path):
  source = GOLDENS / "gemma3_vision"
  want_config, want = weights.load_target(str(source))
  tensors = {respell(k): v for k, v in read_tensors(source).items()}
  directory = tmp_path / "c"
  directory.mkdir()
  shutil.copy(source / "config.json", directory)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  config, params = weights.load_target(str(directory))
  assert config == want_config
  jax.tree.map(np.testing.assert_array_equal, params, want)
  name = "model.language_model.norm.weight"
  twice = tensors | {"language_model.model.norm.weight": tensors[name]}
  safetensors.numpy.save_file(twice, directory / "model.safetensors")
  with pytest.raises(WeightsError, match=r"norm\.weight.*two names"):
    weights.load_target(str(directory))


@pytest.mark.parametrize("case", ["qwen3_moe", "gpt_oss", "gemma3_vision"])
@pytest.mark.parametrize("fault", ["missing", "spare", "shape"])
def test_a_tensor_that_does_not_fit_is_named(case, fault, tmp_path):
  directory = tmp_path / case
  shutil.copytree(GOLDENS / case, directory)
  tensors = read_tensors(directory)
  for path in directory.glob("model*"):
    path.unlink()
  endings = {
    "qwen3_moe": "layers.3.mlp.experts.6.up_proj.weight",
    "gpt_oss": "layers.3.self_attn.sinks",
    "gemma3_vision": "layers.3.pre_feedforward_layernorm.weight",
  }
  (name,) = (name for name in tensors if name.endswith(endings[case]))
  match fault:
    case "missing":
      del tensors[name]
    case "spare":
      tensors[name := name.replace("layers.3", "layers.9")] = np.ones(3)
    case "shape":
      tensors[name] = np.concatenate([tensors[name]] * 2)
  safetensors.numpy.save_file(tensors, directory / "model.safetensors")
  with pytest.raises(WeightsError) as caught:
    weights.load_target(str(directory))
  assert name.partition("layers.")[2] in str(caught.value)
  assert str(directory) in str(caught.value)


# --- Writing ------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_read_back(case, tmp_path):
  config, params = weights.load_target(str(GOLDENS / case))
  weights.save_target(tmp_path / "m", config, params, dtype="float32")
  found, loaded = weights.load_target(str(tmp_path / "m"))
  assert found == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert weights.drafter_kind(str(tmp_path / "m")) == "lm"


def test_tensors_are_saved_as_they_were_stored(tmp_path):
  for case in ("qwen3_moe", "gpt_oss", "gemma3"):
    config, params = weights.load_target(str(GOLDENS / case))
    weights.save_target(tmp_path / case, config, params, dtype="float32")
    found, want = read_tensors(tmp_path / case), read_tensors(GOLDENS / case)
    assert found.keys() == want.keys()
    for name, tensor in want.items():
      np.testing.assert_array_equal(found[name], tensor)


@pytest.mark.parametrize(
  ("case", "changes", "named"),
  [
    ("qwen3_moe", {"experts": None}, "has experts"),
    ("gemma3", {"experts": Experts(3, 1, 5)}, "has no experts"),
    ("gemma3", {"unit_offset": False}, "unit_offset=True"),
    ("gemma3", {"embedding_scale": 2.0}, "embedding_scale"),
    ("gpt_oss", {"attention_sinks": False}, "attention_sinks=True"),
    ("qwen3_moe", {"post_norms": True}, "post_norms=False"),
    ("gemma3", {"layer_windows": (5, 4, 0, 0, 0, 0, 5)}, "layer_windows"),
  ],
)
def test_a_network_that_its_family_cannot_say_is_not_saved(
  tmp_path, case, changes, named
):
  config, params = weights.load_target(str(GOLDENS / case))
  config = dataclasses.replace(config, **changes)
  with pytest.raises(WeightsError, match=named):
    weights.save_target(tmp_path / "m", config, params)
  assert not (tmp_path / "m").exists()


def test_a_draft_model_with_experts_is_not_quantized():
  config, params = weights.load_target(str(GOLDENS / "qwen3_moe"))
  with pytest.raises(WeightsError, match="7 experts cannot be in 8 bits"):
    weights.quantize_drafter(config, params)
