"""The tables of tensor names: complete, exact, and invertible."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.weights import names
from dflash_jax.weights.drafter_names import EXTRAS, drafter_table, publish
from dflash_jax.weights.names import WeightsError
from dflash_jax.weights.target_names import target_table
from tests.testing import VARIANTS

TARGET = TargetConfig(
  family="qwen2",
  num_layers=2,
  width=10,
  mlp_width=13,
  num_heads=3,
  num_kv_heads=1,
  head_width=6,
  vocab_size=29,
  qkv_bias=True,
  qk_norm=True,
)
DRAFTER = DrafterConfig(
  num_layers=2,
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
)
TABLES = {
  "huggingface": target_table(TARGET),
  "gguf": target_table(TARGET, "gguf"),
  "tied": target_table(dataclasses.replace(TARGET, tied_head=True)),
  "drafter": drafter_table(DRAFTER),
} | {
  name: drafter_table(dataclasses.replace(DRAFTER, **parts))
  for name, parts in VARIANTS.items()
}


def draw(table, seed=0):
  """Random stored tensors for every row of a table."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.normal(size=row.shape).astype(np.float32)
    for name, row in table.items()
  }


def shapes(tensors):
  return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", TABLES)
def test_a_tree_and_its_tensors_are_inverses(kind):
  table = TABLES[kind]
  tensors = draw(table)
  tree = names.build_tree(table, tensors.__getitem__, "float32")
  back = names.stored_tensors(table, tree, np.float32, source="tree")
  assert list(back) == list(tensors)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(back[name], tensor)
    assert back[name].flags.c_contiguous


@pytest.mark.parametrize("kind", TABLES)
def test_no_two_tensors_share_a_place(kind):
  paths = [row.path for row in TABLES[kind].values()]
  assert len(set(paths)) == len(paths)


def test_a_target_has_the_documented_tree():
  table = TABLES["huggingface"]
  tree = names.build_tree(table, draw(table).__getitem__, "float32")
  D, F, V, H = 10, 13, 29, 6
  assert tree.keys() == {"embedding", "layers", "norm", "head"}
  assert tree["embedding"].shape == (V, D)
  assert tree["head"]["kernel"].shape == (D, V)
  assert tree["layers"].keys() == {0, 1}
  layer = jax.tree.map(lambda x: x.shape, tree["layers"][1])
  assert layer == {
    "attention_norm": {"scale": (D,)},
    "attention": {
      "query": {"kernel": (D, 3 * H), "bias": (3 * H,)},
      "key": {"kernel": (D, H), "bias": (H,)},
      "value": {"kernel": (D, H), "bias": (H,)},
      "output": {"kernel": (3 * H, D)},
      "query_norm": {"scale": (H,)},
      "key_norm": {"scale": (H,)},
    },
    "mlp_norm": {"scale": (D,)},
    "mlp": {
      "gate": {"kernel": (D, F)},
      "up": {"kernel": (D, F)},
      "down": {"kernel": (F, D)},
    },
  }


def test_a_drafter_has_the_documented_tree():
  table = TABLES["drafter"]
  tree = names.build_tree(table, draw(table).__getitem__, "float32")
  assert tree.keys() == {"context_projection", "context_norm", "layers", "norm"}
  assert tree["context_projection"]["kernel"].shape == (3 * 11, 10)
  assert tree["context_norm"]["scale"].shape == (10,)
  assert tree["layers"][0]["attention"]["query_norm"]["scale"].shape == (6,)
  assert "bias" not in tree["layers"][0]["attention"]["query"]


def test_parts_of_a_drafter_have_the_published_names_and_shapes():
  """Names and shapes of packages dflash 0.1.0 and specforge 0.2.0."""
  D, V = DRAFTER.width, DRAFTER.vocab_size
  published = {
    "dflash2": {
      "layers.1.attention_conv.base_kernel": (2, 3, D),
      "layers.1.attention_conv.kernel_projection.weight": (2 * 3 * 5, D),
      "layers.1.mlp_conv.base_kernel": (2, 3, D),
      "layers.1.mlp_conv.kernel_projection.weight": (2 * 3 * 5, D),
      "candidate_selector.predecessor_codebook": (V, 5),
      "candidate_selector.successor_codebook": (V, 5),
      "candidate_selector.hidden_projection.weight": (5, D),
    },
    "dspark": {
      "markov_head.markov_w1.weight": (V, 6),
      "markov_head.markov_w2.weight": (V, 6),
      "confidence_head.proj.weight": (1, D + 6),
      "confidence_head.proj.bias": (1,),
    },
    "dspark gated": {
      "markov_head.markov_w1.weight": (V, 3),
      "markov_head.markov_w2.weight": (V, 3),
      "markov_head.gate_proj.weight": (3, D + 3),
      "markov_head.gate_proj.bias": (3,),
      "confidence_head.proj.weight": (1, D),
      "confidence_head.proj.bias": (1,),
    },
    "dspark rnn": {
      "markov_head.markov_w1.weight": (V, 5),
      "markov_head.markov_w2.weight": (V, 5),
      "markov_head.joint_proj.weight": (15, 10 + D),
      "markov_head.joint_proj.bias": (15,),
    },
    "domino": {
      "prefix_gru.weight_ih_l0": (21, D),
      "prefix_gru.weight_hh_l0": (21, 7),
      "embed_proj.0.weight": (5, D + 7),
      "embed_proj.2.weight": (V, 5),
    },
  }
  for kind, parts in published.items():
    added = TABLES[kind].keys() - TABLES["drafter"].keys()
    found = {
      name: TABLES[kind][name].shape
      for name in added
      if not name.startswith("layers.0.")
    }
    assert found == parts, kind


@pytest.mark.parametrize(
  ("name", "published"),
  [
    ("logit_head.markov_head.markov_w1.weight", "markov_head.markov_w1.weight"),
    ("logit_head.prefix_gru.weight_ih_l0", "prefix_gru.weight_ih_l0"),
    ("markov_w2.weight", "markov_head.markov_w2.weight"),
    ("gate_proj.bias", "markov_head.gate_proj.bias"),
    ("joint_proj.weight", "markov_head.joint_proj.weight"),
    ("confidence_proj.bias", "confidence_head.proj.bias"),
    (
      "candidate_selector.successor_codebook.weight",
      "candidate_selector.successor_codebook",
    ),
    ("layers.0.mlp.gate_proj.weight", "layers.0.mlp.gate_proj.weight"),
    ("logit_head.weight", "logit_head.weight"),
    ("embed_proj.2.weight", "embed_proj.2.weight"),
  ],
)
def test_other_exporters_names_are_known(name, published):
  assert publish(name) == published
  assert publish(published) == published


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_only_the_options_of_a_target_have_rows(family):
  config = dataclasses.replace(
    TARGET, family=family, qkv_bias=False, qk_norm=family == "qwen3"
  )
  table = target_table(config)
  assert not any(name.endswith(".bias") for name in table)
  assert any("q_norm" in name for name in table) == (family == "qwen3")


@pytest.mark.parametrize("kind", TABLES)
def test_each_missing_tensor_is_named_with_its_shape_and_file(kind):
  table = TABLES[kind]
  for name, row in table.items():
    found = shapes(draw(table))
    del found[name]
    with pytest.raises(WeightsError) as caught:
      names.check_tensors(found, table, source="some/file")
    message = str(caught.value)
    assert name in message and str(row.shape) in message
    assert "some/file" in message and "fetch" in message


@pytest.mark.parametrize("kind", TABLES)
def test_each_tensor_of_another_shape_is_named_with_both_shapes(kind):
  table = TABLES[kind]
  for name, row in table.items():
    wrong = (*row.shape[:-1], row.shape[-1] + 1)
    found = shapes(draw(table)) | {name: wrong}
    with pytest.raises(WeightsError) as caught:
      names.check_tensors(found, table, source="some/file")
    message = str(caught.value)
    assert name in message and "some/file" in message
    assert str(wrong) in message and str(row.shape) in message


def test_a_spare_tensor_is_named():
  table = TABLES["huggingface"]
  found = shapes(draw(table)) | {"model.layers.7.extra": (3, 5)}
  with pytest.raises(WeightsError, match=r"model\.layers\.7\.extra.*\(3, 5\)"):
    names.check_tensors(found, table, source="f", extras=names.TARGET_EXTRAS)


@pytest.mark.parametrize(
  ("extras", "name", "allowed"),
  [
    (names.TARGET_EXTRAS, "model.rotary_emb.inv_freq", True),
    (
      names.TARGET_EXTRAS,
      "model.layers.11.self_attn.rotary_emb.inv_freq",
      True,
    ),
    (names.TARGET_EXTRAS, "lm_head.weight", False),
    (EXTRAS, "lm_head.weight", True),
    (EXTRAS, "embed_tokens.weight", True),
    (EXTRAS, "layers.0.self_attn.q_proj.bias", False),
    (EXTRAS, "my_lm_head.weight", False),
  ],
)
def test_only_listed_extras_are_ignored(extras, name, allowed):
  table = TABLES["tied"]
  found = shapes(draw(table)) | {name: (5,)}
  if allowed:
    names.check_tensors(found, table, source="f", extras=extras)
  else:
    with pytest.raises(WeightsError, match=re.escape(name)):
      names.check_tensors(found, table, source="f", extras=extras)


def test_a_parameter_of_another_network_is_not_saved():
  table = TABLES["drafter"]
  tree = names.build_tree(table, draw(table).__getitem__, "float32")
  tree["layers"][1]["mlp"]["gate"]["bias"] = jnp.zeros(7)
  with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.gate\.bias"):
    names.stored_tensors(table, tree, np.float32, source="tree")
  del tree["layers"][1]["mlp"]["gate"]
  with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.gate_proj\.weight"):
    names.stored_tensors(table, tree, np.float32, source="tree")


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.bfloat16])
def test_parameters_take_the_asked_dtype(stored, dtype):
  values = np.array([[1.0, -2.5, 3.1415927], [0.1, 1e-3, 65.0]], stored)
  placed = names.place(values, True, names.parameter_dtype(dtype))
  assert placed.dtype == jnp.dtype(dtype)
  expected = values.astype(np.float32).T.astype(jnp.dtype(dtype))
  np.testing.assert_array_equal(np.asarray(placed), expected)


@pytest.mark.parametrize("dtype", ["float16", "int32", "float99", None, 7])
def test_other_dtypes_are_refused_by_name(dtype):
  with pytest.raises(ValueError, match="'float32' or 'bfloat16'"):
    names.parameter_dtype(dtype)


def test_parameters_do_not_share_memory_with_the_file():
  stored = np.ones((4, 16), np.float32)
  placed = names.place(stored, False, np.float32)
  stored[:] = 7
  np.testing.assert_array_equal(np.asarray(placed), 1)


def test_a_tied_head_is_the_embedding_transposed():
  table = TABLES["tied"]
  tree = names.build_tree(table, draw(table).__getitem__, "bfloat16")
  names.tie_head(tree)
  np.testing.assert_array_equal(
    np.asarray(tree["head"]["kernel"]), np.asarray(tree["embedding"]).T
  )
  assert tree["head"]["kernel"].dtype == jnp.bfloat16
