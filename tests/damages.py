"""Checkpoints of every kind, tiny and sound, and ways to damage them."""

import dataclasses
import json
import os
import pathlib
import pickle
import struct
from collections.abc import Callable
from typing import Any

import gguf
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from dflash_jax import weights
from dflash_jax.config import DrafterConfig
from dflash_jax.drafters import DFlash
from dflash_jax.networks import Eagle3Config
from dflash_jax.weights import eagle3, names, safetensors_file
from dflash_jax.weights.target_names import target_table
from tests.testing import (
  VARIANTS,
  tiny_drafter_config,
  tiny_target_config,
)

V = 53
TARGET = tiny_target_config(V, num_layers=5, max_length=64, eos_ids=(2,))
TIED = dataclasses.replace(
  TARGET, family="qwen2", qkv_bias=True, tied_head=True
)
EAGLE3 = Eagle3Config(
  width=24,
  mlp_width=14,
  num_heads=4,
  num_kv_heads=2,
  head_width=6,
  vocab_size=V,
  draft_vocab_size=17,
  target_layer_ids=(0, 2, 3),
  target_width=24,
  rotary_base=TARGET.rotary_base,
)
IDS = np.array([1, 5, 7, 30, 52], np.int32)
CONFIG, WEIGHTS = "config.json", "model.safetensors"
VOCABULARY = "draft_vocabulary.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = (
  "model-00001-of-00002.safetensors",
  "model-00002-of-00002.safetensors",
)
KEY = "layers.1.self_attn.k_proj.weight"
NORM = "layers.0.input_layernorm.weight"


# --- Sound checkpoints --------------------------------------------------------


def block_drafter(kind: str) -> DrafterConfig:
  return tiny_drafter_config(
    TARGET, **VARIANTS.get(kind, {}), target_layer_ids=(0, 3, 2)
  )


def save_drafter(directory: pathlib.Path, kind: str, ids=None) -> None:
  config = block_drafter(kind)
  columns = None if ids is None else ids.size
  params = DFlash(config).init(jax.random.key(3), columns=columns)
  params = jax.tree.map(lambda x: x + 0.01, params)  # nothing stays at zero
  if kind == "fp8":
    params = weights.quantize_drafter(config, params)
  weights.save_drafter(
    directory, config, params, draft_vocabulary=ids, dtype="float32"
  )


def save_eagle3(directory: pathlib.Path) -> None:
  rng = np.random.default_rng(3)
  table = eagle3.eagle3_table(EAGLE3)
  params = names.build_tree(
    table,
    lambda name: rng.normal(size=table[name].shape).astype(np.float32),
    "float32",
  )
  ids = np.arange(0, 3 * EAGLE3.draft_vocab_size, 3, dtype=np.int32)
  weights.save_eagle3(
    directory, EAGLE3, params | {"head_ids": ids}, dtype="float32"
  )


def save_target(directory: pathlib.Path, config=TARGET) -> None:
  rng = np.random.default_rng(3)
  table = target_table(config)
  params = names.build_tree(
    table,
    lambda name: rng.normal(size=table[name].shape).astype(np.float32),
    "float32",
  )
  weights.save_target(directory, config, params, dtype="float32")


def save_sharded(directory: pathlib.Path) -> None:
  """The target, in two files and an index."""
  save_target(directory)
  tensors = safetensors.numpy.load_file(directory / WEIGHTS)
  (directory / WEIGHTS).unlink()
  everything = sorted(tensors)
  parts = dict(zip(SHARDS, (everything[:9], everything[9:]), strict=True))
  for shard, part in parts.items():
    safetensors.numpy.save_file(
      {name: tensors[name] for name in part}, directory / shard
    )
  weight_map = {name: shard for shard in parts for name in parts[shard]}
  (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def save_gguf(directory: pathlib.Path) -> None:
  """The target as model.gguf."""
  directory.mkdir()
  writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
  writer.add_block_count(TARGET.num_layers)
  writer.add_context_length(TARGET.max_length)
  writer.add_embedding_length(TARGET.width)
  writer.add_feed_forward_length(TARGET.mlp_width)
  writer.add_head_count(TARGET.num_heads)
  writer.add_head_count_kv(TARGET.num_kv_heads)
  writer.add_key_length(TARGET.head_width)
  writer.add_value_length(TARGET.head_width)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(TARGET.rotary_base)
  writer.add_eos_token_id(2)
  rng = np.random.default_rng(3)
  for name, row in target_table(TARGET, "gguf").items():
    writer.add_tensor(name, rng.normal(size=row.shape).astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


SAVE: dict[str, Callable[[pathlib.Path], None]] = {
  "dflash": lambda place: save_drafter(place, "dflash"),
  "dflash2": lambda place: save_drafter(place, "dflash2", IDS),
  "dspark": lambda place: save_drafter(place, "dspark"),
  "domino": lambda place: save_drafter(place, "domino"),
  "fp8": lambda place: save_drafter(place, "fp8"),
  "eagle3": save_eagle3,
  "target": save_target,
  "tied": lambda place: save_target(place, TIED),
  "sharded": save_sharded,
  "gguf": save_gguf,
}


def source_of(directory: pathlib.Path) -> str:
  """What to name to the command."""
  file = directory / "model.gguf"
  return str(file if file.exists() else directory)


def load(source: str) -> None:
  """Loads a checkpoint as the decoder would."""
  kind = weights.drafter_kind(source)
  if kind == "dflash":
    weights.load_drafter(source)
  elif kind == "eagle3":
    weights.load_eagle3(source)
  else:
    weights.load_target(source, drafts=True)


# --- Damages ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Damage:
  """One way to damage a checkpoint.

  Attributes:
    kind: of checkpoint. do: the damage, to a directory.
    words: all of which one problem must hold.
    loads: whether the loader takes it all the same.
  """

  kind: str
  do: Callable[[pathlib.Path], Any]
  words: tuple[str, ...]
  loads: bool = False


def setting(nested=False, **changes):
  """Changes settings; "absent" removes one."""

  def do(directory):
    values = json.loads((directory / CONFIG).read_text())
    part = values["dflash_config"] if nested else values
    for key, value in changes.items():
      if value == "absent":
        values.pop(key, None)
        values.get("dflash_config", {}).pop(key, None)
      else:
        part[key] = value
    (directory / CONFIG).write_text(json.dumps(values))

  return do


def raw(name, change):
  """Changes the bytes of a file."""

  def do(directory):
    path = directory / name
    path.write_bytes(change(path.read_bytes()))

  return do


def put(name, data):
  """Adds or replaces a file."""
  return lambda directory: (directory / name).write_bytes(data)


def tensor(name, change, file=WEIGHTS):
  """Changes a tensor; None removes it."""

  def do(directory):
    stored = safetensors_file.read_safetensors(directory / file)
    tensors = {name: x.view().copy() for name, x in stored.items()}
    changed = change(tensors.pop(name, None))
    if changed is not None:
      tensors[name] = changed
    with (directory / file).open("wb") as out:
      safetensors_file.write_safetensors(out, tensors)

  return do


def header(change, file=WEIGHTS):
  """Changes the table of a safetensors file, not its data."""

  def do(directory):
    path = directory / file
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    text = change(json.loads(data[8 : 8 + length]))
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

  return do


def entry(name, **changes):
  return header(lambda table: table | {name: table[name] | changes})


def length(value):
  return raw(WEIGHTS, lambda data: struct.pack("<Q", value) + data[8:])


def index(change):
  def do(directory):
    path = directory / INDEX
    path.write_text(json.dumps(change(json.loads(path.read_text()))))

  return do


def relink(name, to):
  def do(directory):
    (directory / name).unlink()
    (directory / name).symlink_to(to)

  return do


def both(*damages):
  def do(directory):
    for damage in damages:
      damage(directory)

  return do


def write_at(number, value):
  def change(array):
    array = array.copy()
    array.reshape(-1)[number] = value
    return array

  return change


def offsets_overlap(table):
  begin, end = table[KEY]["data_offsets"]
  return table | {KEY: table[KEY] | {"data_offsets": [begin - 4, end - 4]}}


def twice(table):
  text = json.dumps(table)
  return (text[:-1] + f', "{KEY}": {json.dumps(table[KEY])}}}').encode()


DAMAGES: dict[str, Damage] = {
  # Files.
  "cut in the data": Damage(
    "dflash", raw(WEIGHTS, lambda x: x[:-5]), (WEIGHTS, "data bytes")
  ),
  "cut in the header": Damage(
    "dflash", raw(WEIGHTS, lambda x: x[:99]), (WEIGHTS, "header claims")
  ),
  "seven bytes": Damage(
    "dflash", raw(WEIGHTS, lambda x: x[:7]), (WEIGHTS, "7 bytes")
  ),
  "no bytes": Damage("eagle3", put(WEIGHTS, b""), (WEIGHTS, "0 bytes")),
  "bytes behind the data": Damage(
    "dflash", raw(WEIGHTS, lambda x: x + b"abc"), (WEIGHTS, "data bytes")
  ),
  "no weights": Damage(
    "dflash",
    lambda directory: (directory / WEIGHTS).unlink(),
    ("holds neither", WEIGHTS),
  ),
  "pickle in their place": Damage(
    "target",
    both(
      lambda directory: (directory / WEIGHTS).unlink(),
      put("pytorch_model.bin", pickle.dumps({"a": 1})),
    ),
    ("holds neither", "only safetensors are read"),
  ),
  "pickle under their name": Damage(
    "target", put(WEIGHTS, pickle.dumps([0] * 999)), (WEIGHTS, "header")
  ),
  "weights are a pipe": Damage(
    "dflash",
    both(
      lambda directory: (directory / WEIGHTS).unlink(),
      lambda directory: os.mkfifo(directory / WEIGHTS),
    ),
    (WEIGHTS, "no regular file"),
  ),
  "weights link to nothing": Damage(
    "dflash", relink(WEIGHTS, "gone/away"), (WEIGHTS, "link to gone/away")
  ),
  "config links to a device": Damage(
    "dflash", relink(CONFIG, "/dev/zero"), (CONFIG, "no regular file")
  ),
  # Header lengths.
  "header length -1": Damage(
    "dflash", length(2**64 - 1), ("header claims 18446744073709551615",)
  ),
  "header length past the file": Damage(
    "dflash", length(10**6), ("header claims 1000000 bytes",)
  ),
  "header length of 5 GB": Damage(
    "dflash", length(5 * 10**9), ("header claims 5000000000", "100000000")
  ),
  "header length 0": Damage("dflash", length(0), ("header is not sound JSON",)),
  "header one byte short": Damage(
    "dflash",
    raw(
      WEIGHTS,
      lambda x: struct.pack("<Q", struct.unpack("<Q", x[:8])[0] // 2) + x[8:],
    ),
    ("header is not sound JSON",),
  ),
  # Headers.
  "header not UTF-8": Damage(
    "dflash", header(lambda _: b'{"\xff\xfe": 1}'), ("not sound JSON", "utf-8")
  ),
  "header a list": Damage("dflash", header(lambda _: [1]), ("no table",)),
  "header too deep": Damage(
    "dflash", header(lambda _: b"[" * 10**6), ("not sound JSON",)
  ),
  "header names a tensor twice": Damage(
    "dflash", header(twice), (KEY, "there twice")
  ),
  "offsets overlap": Damage("dflash", header(offsets_overlap), ("overlap",)),
  "offsets past the data": Damage(
    "dflash",
    entry(KEY, data_offsets=[10**9, 10**9 + 12 * 24 * 4]),
    (KEY, "ends at data byte"),
  ),
  "offsets swapped": Damage(
    "dflash", entry(KEY, data_offsets=[9, 1]), (KEY, "entry says 9 to 1")
  ),
  "offsets negative": Damage(
    "dflash", entry(KEY, data_offsets=[-8, 4]), (KEY, "malformed")
  ),
  "shape does not fill its bytes": Damage(
    "dflash", entry(KEY, shape=[12, 23]), (KEY, "takes 1104 bytes")
  ),
  "shape of 4000 digits": Damage(
    "dflash", entry(KEY, shape=[10**4000, 10**4000]), (KEY, "malformed")
  ),
  "shape of 99 dimensions": Damage(
    "dflash", entry(KEY, shape=[1] * 99), (KEY, "malformed")
  ),
  "dtype unknown": Damage(
    "dflash", entry(KEY, dtype="F8_E8M0"), (KEY, "unknown dtype 'F8_E8M0'")
  ),
  "entry is a text": Damage(
    "dflash", header(lambda x: x | {KEY: "x"}), (KEY, "malformed")
  ),
  # Tensors.
  "tensor missing": Damage(
    "dflash", tensor(KEY, lambda _: None), (KEY, "missing", "(12, 24)")
  ),
  "tensor spare": Damage(
    "dflash",
    tensor("layers.2.mlp.up_proj.weight", lambda _: np.ones((3, 5), "f4")),
    ("layers.2.mlp.up_proj.weight", "no place", "(3, 5)"),
  ),
  "tensor transposed": Damage(
    "dflash", tensor(KEY, lambda x: x.T), (KEY, "(24, 12)", "(12, 24)")
  ),
  "tensor in float64": Damage(
    "dflash", tensor(KEY, lambda x: x.astype("f8")), (KEY, "stored as F64")
  ),
  "tensor in int8": Damage(
    "dflash", tensor(KEY, lambda x: x.astype("i1")), (KEY, "stored as I8")
  ),
  "NaN": Damage(
    "dflash", tensor(KEY, write_at(5, np.nan)), (KEY, "1 numbers", "NaN"), True
  ),
  "infinity in bfloat16": Damage(
    "dflash",
    tensor(KEY, lambda x: write_at(7, np.inf)(x).astype(ml_dtypes.bfloat16)),
    (KEY, "1 numbers", "infinite"),
    True,
  ),
  "zero matrix": Damage(
    "dflash", tensor(KEY, lambda x: 0 * x), (KEY, "all zeros"), True
  ),
  "zero norm": Damage(
    "domino", tensor(NORM, lambda x: -0.0 * x), (NORM, "all zeros"), True
  ),
  "context projection missing": Damage(
    "dflash2", tensor("fc.weight", lambda _: None), ("fc.weight", "no matrix")
  ),
  "context projection for two taps": Damage(
    "dflash2",
    setting(nested=True, target_layer_ids=[0, 1, 2, 3, 4]),
    ("fc.weight", "(24, 72)", "5 taps"),
  ),
  "selector of another rank": Damage(
    "dflash2",
    setting(nested=True, selector_rank=6),
    ("candidate_selector.successor_codebook", "(53, 5)", "(53, 6)"),
  ),
  "convolution missing": Damage(
    "dflash2",
    tensor("layers.0.mlp_conv.base_kernel", lambda _: None),
    ("layers.0.mlp_conv.base_kernel", "missing"),
  ),
  "Markov table cut": Damage(
    "dspark",
    tensor("markov_head.markov_w1.weight", lambda x: x[:-1]),
    ("markov_head.markov_w1.weight", "(52, 6)", "(53, 6)"),
  ),
  "confidence head without a shape": Damage(
    "dspark",
    tensor("confidence_head.proj.weight", lambda x: x.reshape(-1)[0]),
    ("confidence_head.proj.weight", "shape ()"),
  ),
  "GRU missing": Damage(
    "domino",
    tensor("prefix_gru.weight_hh_l0", lambda _: None),
    ("prefix_gru.weight_hh_l0", "missing"),
  ),
  "tied head that differs": Damage(
    "tied",
    tensor("lm_head.weight", lambda _: np.ones((53, 24), "f4")),
    ("lm_head.weight", "differs", "tie_word_embeddings"),
  ),
  # Settings.
  "config missing": Damage(
    "dflash", lambda directory: (directory / CONFIG).unlink(), ("no such file",)
  ),
  "config cut": Damage(
    "dflash", raw(CONFIG, lambda x: x[:77]), (CONFIG, "not readable as JSON")
  ),
  "config not UTF-8": Damage(
    "eagle3", put(CONFIG, b'{"a": "\xff"}'), (CONFIG, "utf-8")
  ),
  "config too deep": Damage(
    "target", put(CONFIG, b"[" * 10**6), (CONFIG, "not readable as JSON")
  ),
  "config nested a hundred times": Damage(
    "dflash",
    setting(extra=json.loads("[" * 99 + "]" * 99)),
    (CONFIG, "nested deeper than 64"),
  ),
  "config a list": Damage(
    "dflash", put(CONFIG, b"[1]"), (CONFIG, "holds list")
  ),
  "config names a key twice": Damage(
    "dflash",
    raw(CONFIG, lambda x: b'{"head_dim": 4,' + x[1:]),
    (CONFIG, "'head_dim' is there twice"),
  ),
  "config of a foreign model": Damage(
    "dflash",
    setting(architectures=["BertModel"], model_type="bert"),
    ("architectures", "BertModel", "not supported"),
  ),
  "config of another drafter": Damage(
    "dflash",
    setting(architectures=["DFlash2DraftModel"]),
    ("conv_kernel_size is missing",),
  ),
  "config of another size": Damage(
    "target", setting(hidden_size=32), ("model.norm.weight", "(24,)", "(32,)")
  ),
  "a billion layers": Damage(
    "dflash", setting(num_hidden_layers=10**9), ("num_hidden_layers", "4096")
  ),
  "width of 400 digits": Damage(
    "dflash", setting(rms_norm_eps=10**400), ("rms_norm_eps", "finite")
  ),
  "heads of width 0": Damage(
    "dflash", setting(head_dim=0), ("head_dim is 0", "expected 1")
  ),
  "odd heads": Damage("eagle3", setting(head_dim=5), ("head_width=5", "even")),
  "no heads": Damage(
    "target", setting(num_attention_heads="absent"), ("num_attention_heads",)
  ),
  "mask token past the vocabulary": Damage(
    "dflash",
    setting(nested=True, mask_token_id=53),
    ("mask_token_id=53", "vocabulary of 53"),
  ),
  "block of one": Damage(
    "dflash", setting(nested=True, block_size=1), ("block_size=1",)
  ),
  "tap past the target": Damage(
    "dflash", setting(nested=True, target_layer_ids=[0, 5, 2]), ("tap 5",)
  ),
  "windows of another depth": Damage(
    "dflash", setting(layer_types=["full_attention"]), ("layer_types", "1 ent")
  ),
  "attention biases": Damage(
    "dflash", setting(attention_bias=True), ("attention_bias=True",)
  ),
  "end token past the vocabulary": Damage(
    "target", setting(eos_token_id=[99]), ("eos_token_id", "0 to 52")
  ),
  "another vocabulary": Damage(
    "target",
    setting(vocab_size=51),
    ("model.embed_tokens.weight", "(53, 24)", "(51, 24)"),
  ),
  "generation config cut": Damage(
    "target", put("generation_config.json", b"{"), ("generation_config.json",)
  ),
  # Draft vocabularies.
  "draft vocabulary unsorted": Damage(
    "dflash2",
    tensor("ids", lambda x: x[::-1], VOCABULARY),
    (VOCABULARY, "not a draft vocabulary"),
  ),
  "draft vocabulary past the target's": Damage(
    "dflash2",
    tensor("ids", lambda x: x + 1, VOCABULARY),
    (VOCABULARY, "at most 52"),
  ),
  "draft vocabulary in int64": Damage(
    "dflash2",
    tensor("ids", lambda x: x.astype("i8"), VOCABULARY),
    (VOCABULARY, "int64"),
  ),
  "draft vocabulary cut": Damage(
    "dflash2", raw(VOCABULARY, lambda x: x[:-1]), (VOCABULARY, "data byte")
  ),
  "d2t past the vocabulary": Damage(
    "eagle3", tensor("d2t", lambda x: x + 9), ("d2t leads to ids", "0..52")
  ),
  "d2t twice the same": Damage(
    "eagle3", tensor("d2t", lambda x: -np.arange(17)), ("d2t leads to ids",)
  ),
  "d2t in floats": Damage(
    "eagle3", tensor("d2t", lambda x: x.astype("f4")), ("d2t is float32",)
  ),
  "d2t missing": Damage(
    "eagle3", tensor("d2t", lambda _: None), ("d2t is missing",)
  ),
  "t2d says otherwise": Damage(
    "eagle3", tensor("t2d", np.logical_not), ("d2t and t2d",)
  ),
  "head of another size": Damage(
    "eagle3",
    setting(draft_vocab_size=18),
    ("lm_head.weight", "(17, 24)", "(18, 24)"),
  ),
  "EAGLE-3 of two layers": Damage(
    "eagle3", setting(num_hidden_layers=2), ("num_hidden_layers=2",)
  ),
  # Kernels in 8 bits.
  "scale missing": Damage(
    "fp8", tensor(f"{KEY}_scale", lambda _: None), (f"{KEY}_scale is missing",)
  ),
  "scale of another shape": Damage(
    "fp8", tensor(f"{KEY}_scale", lambda x: x[:, 0]), (KEY, "(12,)", "(12, 1)")
  ),
  "scale not finite": Damage(
    "fp8", tensor(f"{KEY}_scale", write_at(3, np.inf)), (KEY, "inf in row 3")
  ),
  "scale of nothing": Damage(
    "fp8",
    tensor(f"{NORM}_scale", lambda _: np.ones((24, 1), "f4")),
    (f"{NORM}_scale", "not in 8 bits"),
  ),
  "NaN in 8 bits": Damage(
    "fp8", tensor(KEY, write_at(25, np.nan)), (KEY, "NaN in row 1")
  ),
  "8 bits that the config denies": Damage(
    "fp8", setting(quantization_config="absent"), (KEY, "stored as F8_E4M3")
  ),
  "another scheme of 8 bits": Damage(
    "fp8",
    setting(quantization_config={"quant_method": "fp8"}),
    ("quant_method='fp8'",),
  ),
  # Shards.
  "shard missing": Damage(
    "sharded",
    lambda directory: (directory / SHARDS[1]).unlink(),
    (SHARDS[1], "cannot be read"),
  ),
  "shard lacks a tensor": Damage(
    "sharded",
    tensor("lm_head.weight", lambda _: None, SHARDS[0]),
    ("lm_head.weight", f"missing from {SHARDS[0]}"),
  ),
  "shard repeats a tensor": Damage(
    "sharded",
    tensor("lm_head.weight", lambda _: np.ones((53, 24), "f4"), SHARDS[1]),
    ("lm_head.weight", f"also in {SHARDS[0]}"),
  ),
  "index leads elsewhere": Damage(
    "sharded",
    index(lambda x: {"weight_map": {"a": "../../etc/passwd"}}),
    (INDEX, "does not name files beside it"),
  ),
  "index names no file": Damage(
    "sharded",
    index(lambda x: {"weight_map": {"a": "\0"}}),
    ("cannot be read", "null"),
  ),
  "index a text": Damage(
    "sharded", index(lambda x: {"weight_map": "a"}), (INDEX, "weight_map")
  ),
  # GGUF.
  "GGUF cut": Damage(
    "gguf", raw("model.gguf", lambda x: x[:-9]), ("model.gguf", "ends at byte")
  ),
  "GGUF of another magic": Damage(
    "gguf", raw("model.gguf", lambda x: b"GGML" + x[4:]), ("not a GGUF file",)
  ),
  "GGUF of 2^62 tensors": Damage(
    "gguf",
    raw("model.gguf", lambda x: x[:8] + struct.pack("<Q", 2**62) + x[16:]),
    ("model.gguf", "at byte"),
  ),
  "GGUF with a string of 2^63 bytes": Damage(
    "gguf",
    raw("model.gguf", lambda x: x[:24] + struct.pack("<Q", 2**63) + x[32:]),
    ("needs 9223372036854775808 more bytes",),
  ),
  "GGUF with NaN": Damage(
    "gguf",
    raw("model.gguf", lambda x: x[:-4] + struct.pack("<f", np.nan)),
    ("NaN",),
    True,
  ),
}
