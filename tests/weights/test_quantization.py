"""Kernels in 8 bits in files: the layout others know, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dflash_jax import fp8, weights
from dflash_jax.fp8 import Fp8Kernel
from dflash_jax.networks import Eagle3Config, TargetConfig
from dflash_jax.weights import names
from dflash_jax.weights.drafter_names import drafter_table
from dflash_jax.weights.eagle3 import eagle3_table
from dflash_jax.weights.names import WeightsError
from dflash_jax.weights.target_names import target_table
from pallas_kernels.fp8_matmul import quantize
from tests.testing import VARIANTS
from tests.weights.test_drafter import CONFIG, assert_same, draw, edit

EAGLE3 = Eagle3Config(
  width=10,
  mlp_width=7,
  num_heads=4,
  num_kv_heads=2,
  head_width=6,
  vocab_size=29,
  draft_vocab_size=11,
  target_layer_ids=(0, 4, 2),
  target_width=11,
)
LM = TargetConfig(
  family="qwen2",
  num_layers=2,
  width=10,
  mlp_width=7,
  num_heads=4,
  num_kv_heads=2,
  head_width=6,
  vocab_size=29,
  qkv_bias=True,
  tied_head=True,
)
KEY = "layers.1.self_attn.k_proj.weight"
# Linear layers that are in 8 bits: of every layer, and of a kind besides fc.
LAYER = (
  "self_attn.q_proj",
  "self_attn.k_proj",
  "self_attn.v_proj",
  "self_attn.o_proj",
  "mlp.gate_proj",
  "mlp.up_proj",
  "mlp.down_proj",
)
CONVOLUTIONS = (
  "attention_conv.kernel_projection",
  "mlp_conv.kernel_projection",
)
PARTS = {
  "dflash": (),
  "dflash2": ("candidate_selector.hidden_projection",),
  "dspark": (),
  "dspark gated": ("markov_head.gate_proj",),
  "dspark rnn": ("markov_head.joint_proj",),
  "domino": ("embed_proj.0",),
  "domino shifted": ("embed_proj.0",),
}


def with_parts(name):
  return dataclasses.replace(CONFIG, **VARIANTS.get(name, {}))


def save(directory, config=CONFIG, dtype="bfloat16", **settings):
  """A drafter in 8 bits, and its parameters before."""
  params = draw(config)
  weights.save_drafter(
    directory,
    config,
    weights.quantize_drafter(config, params),
    dtype=dtype,
    **settings,
  )
  return params


@pytest.fixture
def saved(tmp_path):
  """The directory of a drafter in 8 bits."""
  save(tmp_path / "d")
  return tmp_path / "d"


def tensors_of(directory):
  """What the file holds, as its own package reads it."""
  dtypes = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "BF16": ml_dtypes.bfloat16,
    "F32": np.float32,
  }
  file = (directory / "model.safetensors").read_bytes()
  return {
    name: np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(
      entry["shape"]
    )
    for name, entry in safetensors.deserialize(file)
  }


def replace_tensors(directory, **changes):
  """Puts tensors in the place of others; None removes one."""
  tensors = tensors_of(directory) | changes
  safetensors.numpy.save_file(
    {name: x for name, x in tensors.items() if x is not None},
    directory / "model.safetensors",
  )


def change_config(directory, *path, value):
  """Sets a key deep in quantization_config."""
  file = directory / "config.json"
  values = json.loads(file.read_text())
  part = values["quantization_config"]
  for key in path[:-1]:
    part = part[key]
  part[path[-1]] = value
  file.write_text(json.dumps(values))


# --- Round trips --------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_a_drafter_in_8_bits_survives_saving(tmp_path, name):
  config = with_parts(name)
  params = weights.quantize_drafter(config, draw(config))
  weights.save_drafter(tmp_path / "d", config, params, dtype="float32")
  found, loaded, _ = weights.load_drafter(tmp_path / "d")
  assert found == config
  assert_same(loaded, params)


@pytest.mark.parametrize("name", PARTS)
def test_linear_layers_are_in_8_bits_and_nothing_else_is(tmp_path, name):
  save(tmp_path / "d", with_parts(name))
  quantized = {
    key.removesuffix(".weight")
    for key, x in tensors_of(tmp_path / "d").items()
    if x.dtype == ml_dtypes.float8_e4m3fn
  }
  layer = LAYER + (CONVOLUTIONS if name == "dflash2" else ())
  layers = {
    f"layers.{index}.{key}"
    for index in range(CONFIG.num_layers)
    for key in layer
  }
  assert quantized == layers | {"fc", *PARTS[name]}


def test_eagle3_survives_saving_with_its_head_whole(tmp_path):
  rng = np.random.default_rng(0)
  table = eagle3_table(EAGLE3)
  params = names.build_tree(
    table, lambda name: rng.normal(size=table[name].shape), "float32"
  )
  params["head_ids"] = jnp.asarray([0, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12])
  small = weights.quantize_drafter(EAGLE3, params)
  weights.save_eagle3(tmp_path / "d", EAGLE3, small, dtype="float32")
  found, loaded = weights.load_eagle3(tmp_path / "d", num_target_layers=6)
  assert found == EAGLE3
  assert_same(loaded, small)
  assert not fp8.is_kernel(loaded["head"]["kernel"])
  assert fp8.is_kernel(loaded["context_projection"]["kernel"])


def test_a_language_model_in_8_bits_drafts_but_is_no_target(tmp_path):
  rng = np.random.default_rng(0)
  table = target_table(LM)
  params = names.build_tree(
    table, lambda name: rng.normal(size=table[name].shape), "float32"
  )
  names.tie_head(params)
  small = weights.quantize_drafter(LM, params)
  place = str(tmp_path / "d")
  weights.save_target(place, LM, small, dtype="float32")
  found, loaded = weights.load_target(place, drafts=True)
  assert found == LM
  assert_same(loaded, small)
  assert fp8.is_kernel(loaded["layers"][1]["attention"]["key"]["kernel"])
  assert not fp8.is_kernel(loaded["head"]["kernel"])
  with pytest.raises(WeightsError, match="take the unquantised checkpoint"):
    weights.load_target(place)


def test_a_trimmed_vocabulary_stays_beside_8_bits(tmp_path):
  config = with_parts("dspark")
  ids = np.array([0, 3, 4, 28], np.int32)
  params = weights.quantize_drafter(config, draw(config, columns=4))
  weights.save_drafter(
    tmp_path / "d", config, params, draft_vocabulary=ids, dtype="float32"
  )
  _, loaded, vocabulary = weights.load_drafter(tmp_path / "d")
  assert_same(loaded, params)
  np.testing.assert_array_equal(vocabulary, ids)


# --- The layout that others read ----------------------------------------------


def test_values_times_scale_are_the_weights(tmp_path):
  """As a reader would multiply them who knows nothing but the layout."""
  params = save(tmp_path / "d")
  tensors = tensors_of(tmp_path / "d")
  for name, row in drafter_table(CONFIG).items():
    stored = tensors[name]
    if stored.dtype != ml_dtypes.float8_e4m3fn:
      assert stored.dtype == ml_dtypes.bfloat16 and stored.ndim < 2
      continue
    scale = tensors[f"{name}_scale"]
    assert stored.shape == row.shape and scale.shape == (row.shape[0], 1)
    assert scale.dtype == np.float32
    leaf = params
    for key in row.path:
      leaf = leaf[key]
    true = np.asarray(leaf).T
    error = np.abs(stored.astype(np.float32) * scale - true)
    assert (error <= np.maximum(np.abs(true) / 16, scale / 1024) * 1.001).all()
    largest = np.abs(stored.astype(np.float32)).max(axis=1)
    np.testing.assert_array_equal(largest, 448)


def test_config_names_the_scheme_of_compressed_tensors(tmp_path):
  save(tmp_path / "d", with_parts("dspark"))
  values = json.loads((tmp_path / "d" / "config.json").read_text())
  stated = values["quantization_config"]
  assert stated["quant_method"] == "compressed-tensors"
  assert stated["format"] == "float-quantized"
  assert stated["ignore"] == [
    "confidence_head.proj",
    "lm_head",
    "markov_head.markov_w2",
  ]
  (group,) = stated["config_groups"].values()
  assert group["targets"] == ["Linear"]
  kinds = {"num_bits": 8, "type": "float", "symmetric": True}
  assert group["weights"] == kinds | {"strategy": "channel", "dynamic": False}
  assert group["input_activations"] == (
    kinds | {"strategy": "token", "dynamic": True}
  )
  assert values["torch_dtype"] == "bfloat16"


def test_a_drafter_without_8_bits_does_not_speak_of_them(tmp_path):
  weights.save_drafter(tmp_path / "d", CONFIG, draw(CONFIG))
  values = json.loads((tmp_path / "d" / "config.json").read_text())
  assert "quantization_config" not in values


def test_scales_in_bfloat16_are_read_as_llm_compressor_writes_them(saved):
  name = f"{KEY}_scale"
  scale = tensors_of(saved)[name].astype(ml_dtypes.bfloat16)
  replace_tensors(saved, **{name: scale})
  change_config(saved, "config_groups", "group_0", "format", value=None)
  change_config(saved, "quantization_status", value="frozen")
  _, params, _ = weights.load_drafter(saved)
  kernel = params["layers"][1]["attention"]["key"]["kernel"]
  assert kernel.scale.dtype == jnp.float32
  np.testing.assert_array_equal(kernel.scale, scale[:, 0].astype(np.float32))


def test_a_layer_that_config_ignores_may_be_whole(saved):
  change_config(saved, "ignore", value=["lm_head", KEY.removesuffix(".weight")])
  whole = np.ones((12, 10), ml_dtypes.bfloat16)
  replace_tensors(saved, **{KEY: whole, f"{KEY}_scale": None})
  _, params, _ = weights.load_drafter(saved)
  layer = params["layers"][1]["attention"]
  assert not fp8.is_kernel(layer["key"]["kernel"])
  assert fp8.is_kernel(layer["query"]["kernel"])


# --- What is refused ----------------------------------------------------------


def faulty(kind, tensors):
  """Tensors to replace for a fault, and what its error must name."""
  codes, scale = tensors[KEY].copy(), tensors[f"{KEY}_scale"].copy()
  match kind:
    case "scale missing":
      return {f"{KEY}_scale": None}, f"{KEY}_scale is missing"
    case "scale transposed":
      return {f"{KEY}_scale": scale.T.copy()}, "has shape (1, 12)"
    case "scale flat":
      return {f"{KEY}_scale": scale[:, 0].copy()}, "has shape (12,)"
    case "scale of whole numbers":
      return {f"{KEY}_scale": scale.astype(np.int32)}, "stored as I32"
    case "scale too many":
      name = "layers.1.self_attn.k_norm.weight"
      return {f"{name}_scale": np.ones((6, 1), np.float32)}, f"{name}_scale"
    case "input scale":
      name = KEY.replace("weight", "input_scale")
      return {name: np.ones(1, np.float32)}, name
    case "scale zero":
      scale[7] = 0
      return {f"{KEY}_scale": scale}, f"{KEY}_scale is 0.0 in row 7"
    case "scale negative":
      scale[7] = -2
      return {f"{KEY}_scale": scale}, f"{KEY}_scale is -2.0 in row 7"
    case "scale infinite":
      scale[0] = np.inf
      return {f"{KEY}_scale": scale}, f"{KEY}_scale is inf in row 0"
    case "scale not a number":
      scale[0] = np.nan
      return {f"{KEY}_scale": scale}, f"{KEY}_scale is nan in row 0"
    case "value not a number":
      codes[5, 9] = np.nan
      return {KEY: codes}, f"{KEY} holds NaN in row 5"
    case "kernel transposed":
      return {KEY: codes.T.copy()}, "expected (10, 1)"
    case "kernel whole":
      whole = codes.astype(ml_dtypes.bfloat16)
      return {KEY: whole}, f"{KEY} is stored as BF16"
    case "kernel e5m2":
      other = codes.astype(ml_dtypes.float8_e5m2)
      return {KEY: other}, f"{KEY} is stored as F8_E5M2"
    case "kernel missing":
      return {KEY: None, f"{KEY}_scale": None}, KEY
    case "norm in 8 bits":
      name = "norm.weight"
      small = tensors[name].astype(ml_dtypes.float8_e4m3fn)
      return {name: small}, f"{name} is stored as F8_E4M3"
  raise AssertionError(kind)


@pytest.mark.parametrize(
  "kind",
  [
    "scale missing",
    "scale transposed",
    "scale flat",
    "scale of whole numbers",
    "scale too many",
    "input scale",
    "scale zero",
    "scale negative",
    "scale infinite",
    "scale not a number",
    "value not a number",
    "kernel transposed",
    "kernel whole",
    "kernel e5m2",
    "kernel missing",
    "norm in 8 bits",
  ],
)
def test_a_faulty_tensor_is_named(saved, kind):
  changes, named = faulty(kind, tensors_of(saved))
  replace_tensors(saved, **changes)
  with pytest.raises(WeightsError) as caught:
    weights.load_drafter(saved)
  assert named in str(caught.value) and str(saved) in str(caught.value)
  assert "; " in str(caught.value)  # a remedy follows


@pytest.mark.parametrize(
  ("path", "value", "named"),
  [
    (("quant_method",), "fp8", "quant_method='fp8'"),
    (("format",), "pack-quantized", "format='pack-quantized'"),
    (("config_groups",), {}, "config_groups=[]"),
    (("config_groups", "group_0", "targets"), ["re:.*q_proj"], "targets"),
    (
      ("config_groups", "group_0", "weights", "strategy"),
      "tensor",
      "strategy='tensor'",
    ),
    (("config_groups", "group_0", "weights", "num_bits"), 4, "num_bits=4"),
    (("config_groups", "group_0", "weights", "type"), "int", "type='int'"),
    (
      ("config_groups", "group_0", "input_activations", "dynamic"),
      None,
      "dynamic=False",
    ),
    (
      ("config_groups", "group_0", "input_activations"),
      None,
      "num_bits=None",
    ),
    (("kv_cache_scheme",), {"num_bits": 8}, "kv_cache_scheme"),
    (("ignore",), "lm_head", "ignore is 'lm_head'"),
  ],
)
def test_another_scheme_is_refused_by_name(saved, path, value, named):
  change_config(saved, *path, value=value)
  with pytest.raises(WeightsError) as caught:
    weights.load_drafter(saved)
  assert named in str(caught.value)
  assert "quantization_config" in str(caught.value)


def test_8_bits_of_which_config_says_nothing_are_refused(saved):
  edit(saved, quantization_config="absent")
  with pytest.raises(WeightsError, match=r"F8_E4M3, but config\.json does not"):
    weights.load_drafter(saved)


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_kernels_that_are_not_finite_are_not_quantised(wrong):
  params = draw(CONFIG)
  layer = params["layers"][1]["attention"]["key"]
  layer["kernel"] = layer["kernel"].at[3, 2].set(wrong)
  with pytest.raises(WeightsError, match="k_proj.weight_scale is (inf|nan)"):
    weights.quantize_drafter(CONFIG, params)


# --- Planted bugs -------------------------------------------------------------


@pytest.mark.parametrize(
  "bug", ["scale forgotten", "scale of the wrong axis", "one scale for all"]
)
def test_a_wrong_quantiser_does_not_give_the_weights_back(
  tmp_path, monkeypatch, bug
):
  def wrong(kernel):
    sound = Fp8Kernel(*quantize(kernel))
    if bug == "scale forgotten":
      return Fp8Kernel(sound.values, jnp.ones_like(sound.scale))
    if bug == "scale of the wrong axis":
      limits = jnp.abs(kernel).max(axis=1) / 448
      return Fp8Kernel(sound.values, jnp.resize(limits, sound.scale.shape))
    scale = jnp.full_like(sound.scale, jnp.abs(kernel).max() / 448)
    return Fp8Kernel((kernel.T / scale[:, None]).astype(names.FP8), scale)

  monkeypatch.setattr(Fp8Kernel, "quantize", wrong)
  with pytest.raises(AssertionError):
    test_values_times_scale_are_the_weights(tmp_path)


def test_values_read_transposed_are_found(saved, monkeypatch):
  _, sound, _ = weights.load_drafter(saved)
  convert = jnp.asarray

  def transposed(x):
    is_kernel = x.dtype == ml_dtypes.float8_e4m3fn
    return convert(x.T) if is_kernel else convert(x)

  monkeypatch.setattr(weights.quantization.jnp, "asarray", transposed)
  _, wrong, _ = weights.load_drafter(saved)
  monkeypatch.undo()
  assert jax.tree.structure(wrong) == jax.tree.structure(sound)
  with pytest.raises(AssertionError):
    assert_same(wrong, sound)
