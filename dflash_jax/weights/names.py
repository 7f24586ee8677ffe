"""Which stored tensor becomes which parameter, and nothing else may.

Parameter trees are plain nested dicts; layers are keyed by integers:

  target:  {"embedding": [V, D], "layers": {i: layer}, "norm": {"scale": [D]},
            "head": {"kernel": [D, V]}}
  drafter: {"context_projection": {"kernel": [taps * D_target, D]},
            "context_norm": {"scale": [D]}, "layers": {i: layer},
            "norm": {"scale": [D]}, "corrector": {...}, "confidence": {...}}
  layer:   {"attention_norm": {"scale": [D]},
            "attention": {"query": {"kernel": [D, N * H], "bias": [N * H]},
                          "key", "value": {"kernel": [D, G * H], "bias"},
                          "output": {"kernel": [N * H, D]},
                          "query_norm", "key_norm": {"scale": [H]}},
            "mlp_norm": {"scale": [D]},
            "mlp": {"gate", "up": {"kernel": [D, F]},
                    "down": {"kernel": [F, D]}}}

Biases are Qwen2's, query_norm and key_norm Qwen3's and the drafter's. gpt-oss
has attention "sinks": [N] and a bias of "output"; Gemma 3 an
"attention_post_norm" and an "mlp_post_norm"; experts.py says what stands in the
place of an mlp. Kernels are [in, out], the transpose of what files store; one
in 8 bits is an Fp8Kernel and lies as files have it. Parts of a drafter are in
drafter_names.py; a layer's convolutions lie beside its attention and mlp.
"""

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.fp8 import Fp8Kernel

FP8 = np.dtype(jnp.float8_e4m3fn)
SCALE = "_scale"  # behind the name of a kernel in 8 bits

Params = dict[Any, Any]
Path = tuple[str | int, ...]


class WeightsError(ValueError):
  """A checkpoint that cannot be used; names the file, fault and remedy.

  Attributes:
    subject: the setting or tensor at fault, where it is one.
  """

  def __init__(self, message: str, subject: str = ""):
    super().__init__(message)
    self.subject = subject


# What a reader does with a fault, before it goes on with what is left.
OnError = Callable[[WeightsError], None]


def give_up(error: WeightsError) -> None:
  """Raises it: what readers do with a fault unless told otherwise."""
  raise error


@contextlib.contextmanager
def telling(on_error: OnError) -> Iterator[None]:
  """Tells `on_error` of the fault that ends the block, if any does."""
  try:
    yield
  except WeightsError as error:
    on_error(error)


@dataclasses.dataclass(frozen=True)
class TensorRow:
  """One row of a table.

  Attributes:
    path: keys that lead to the parameter in the tree.
    transpose: whether the parameter is the stored matrix, transposed.
    shape: as stored.
  """

  path: Path
  transpose: bool
  shape: tuple[int, ...]


Table = dict[str, TensorRow]

# Path in a layer: (name in Hugging Face files, name in GGUF files).
LAYER_NAMES: dict[Path, tuple[str, str]] = {
  ("attention_norm", "scale"): ("input_layernorm.weight", "attn_norm.weight"),
  ("attention", "query", "kernel"): (
    "self_attn.q_proj.weight",
    "attn_q.weight",
  ),
  ("attention", "key", "kernel"): ("self_attn.k_proj.weight", "attn_k.weight"),
  ("attention", "value", "kernel"): (
    "self_attn.v_proj.weight",
    "attn_v.weight",
  ),
  ("attention", "output", "kernel"): (
    "self_attn.o_proj.weight",
    "attn_output.weight",
  ),
  ("attention", "query", "bias"): ("self_attn.q_proj.bias", "attn_q.bias"),
  ("attention", "key", "bias"): ("self_attn.k_proj.bias", "attn_k.bias"),
  ("attention", "value", "bias"): ("self_attn.v_proj.bias", "attn_v.bias"),
  ("attention", "query_norm", "scale"): (
    "self_attn.q_norm.weight",
    "attn_q_norm.weight",
  ),
  ("attention", "key_norm", "scale"): (
    "self_attn.k_norm.weight",
    "attn_k_norm.weight",
  ),
  ("attention", "output", "bias"): (
    "self_attn.o_proj.bias",
    "attn_output.bias",
  ),
  ("attention", "sinks"): ("self_attn.sinks", "attn_sinks.weight"),
  ("mlp_norm", "scale"): ("post_attention_layernorm.weight", "ffn_norm.weight"),
  ("mlp", "gate", "kernel"): ("mlp.gate_proj.weight", "ffn_gate.weight"),
  ("mlp", "up", "kernel"): ("mlp.up_proj.weight", "ffn_up.weight"),
  ("mlp", "down", "kernel"): ("mlp.down_proj.weight", "ffn_down.weight"),
}
# Buffers that old exporters wrote and that the config already determines.
ROTARY_BUFFERS = r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
TARGET_EXTRAS = re.compile(ROTARY_BUFFERS)


def layer_shapes(
  config: TargetConfig | DrafterConfig, *, bias: bool, norms: bool
) -> dict[Path, tuple[int, ...]]:
  """Stored shapes of the tensors of one layer."""
  D, F, H = config.width, config.mlp_width, config.head_width
  queries, keys = config.num_heads * H, config.num_kv_heads * H
  shapes: dict[Path, tuple[int, ...]] = {
    ("attention_norm", "scale"): (D,),
    ("attention", "query", "kernel"): (queries, D),
    ("attention", "key", "kernel"): (keys, D),
    ("attention", "value", "kernel"): (keys, D),
    ("attention", "output", "kernel"): (D, queries),
    ("mlp_norm", "scale"): (D,),
    ("mlp", "gate", "kernel"): (F, D),
    ("mlp", "up", "kernel"): (F, D),
    ("mlp", "down", "kernel"): (D, F),
  }
  if bias:
    shapes["attention", "query", "bias"] = (queries,)
    shapes["attention", "key", "bias"] = (keys,)
    shapes["attention", "value", "bias"] = (keys,)
  if norms:
    shapes["attention", "query_norm", "scale"] = (H,)
    shapes["attention", "key_norm", "scale"] = (H,)
  return shapes


def make_row(path: Path, shape: tuple[int, ...]) -> TensorRow:
  """The row of a parameter, by whose name a kernel is known."""
  return TensorRow(path, str(path[-1]).endswith("kernel"), shape)


def _some(names: Sequence[str]) -> str:
  listed = ", ".join(names[:3])
  return listed if len(names) <= 3 else f"{listed} and {len(names) - 3} more"


@dataclasses.dataclass(frozen=True)
class Differences:
  """Names of tensors: those a table asks for in vain, and those it refuses."""

  missing: list[str]
  spare: list[str]
  misshapen: list[str]

  @classmethod
  def between(
    cls,
    found: Mapping[str, tuple[int, ...]],
    table: Table,
    extras: re.Pattern[str] | None = None,
  ) -> "Differences":
    """How `found` differs from what `table` asks for; see check_tensors."""
    return cls(
      missing=sorted(table.keys() - found.keys()),
      spare=sorted(
        name
        for name in found.keys() - table.keys()
        if extras is None or not extras.fullmatch(name)
      ),
      misshapen=[
        name
        for name, row in table.items()
        if name in found and tuple(found[name]) != row.shape
      ],
    )


def check_tensors(
  found: Mapping[str, tuple[int, ...]],
  table: Table,
  *,
  source: str,
  extras: re.Pattern[str] | None = None,
) -> None:
  """Raises WeightsError unless `found` is exactly what `table` asks for.

  Args:
    found: stored shape of each tensor, by name.
    table: what there must be.
    source: the file or directory, for messages.
    extras: names that may also be there and are ignored.
  """
  differences = Differences.between(found, table, extras)
  if missing := differences.missing:
    raise WeightsError(
      f"{source}: {len(missing)} of {len(table)} tensors are missing: "
      f"{_some(missing)} (shape {table[missing[0]].shape} expected of "
      f"{missing[0]}); the copy is incomplete or its config describes "
      "another network: fetch the checkpoint again, config included"
    )
  if spare := differences.spare:
    raise WeightsError(
      f"{source}: {len(spare)} tensors have no place in this network: "
      f"{_some(spare)} ({spare[0]} has shape {found[spare[0]]}); its config "
      "describes another network, or this kind of network is not supported"
    )
  for name in differences.misshapen:
    raise WeightsError(
      f"{source}: tensor {name} has shape {tuple(found[name])}, but its "
      f"config asks for {table[name].shape}; config and weights belong to "
      "different checkpoints: fetch both from the same place"
    )


def parameter_dtype(dtype: Any) -> np.dtype:
  """`dtype` as a numpy dtype; ValueError unless parameters may have it."""
  try:
    parsed = np.dtype(jnp.dtype(dtype))
  except TypeError:
    parsed = None
  if parsed is None or parsed.name not in ("float32", "bfloat16"):
    raise ValueError(
      f"parameters cannot be {dtype!r}; use 'float32' or 'bfloat16'"
    )
  return parsed


def main_dtype(tensors: Mapping[str, np.ndarray]) -> str:
  """The dtype of most stored numbers but those in 8 bits, and their scales."""
  sizes: dict[str, int] = collections.Counter()
  for name, tensor in tensors.items():
    is_scale = name.endswith(SCALE) and name.removesuffix(SCALE) in tensors
    if tensor.dtype != FP8 and not is_scale:
      sizes[tensor.dtype.name] += tensor.size
  return max(sizes, key=lambda dtype: sizes[dtype])


def place(stored: np.ndarray, transpose: bool, dtype: Any) -> jax.Array:
  """One stored tensor as a parameter: laid out, converted, its own copy."""
  laid_out = stored.T if transpose else stored
  return jnp.asarray(np.array(laid_out, dtype=dtype, order="C"))


def build_tree(
  table: Table, fetch: Callable[[str], np.ndarray | Fp8Kernel], dtype: Any
) -> Params:
  """The tree of a checkpoint, converted one tensor at a time.

  Args:
    table: what to build.
    fetch: gives a stored tensor, in its stored shape, by name; or a kernel in 8
      bits, which stays as it is.
    dtype: of the parameters; None as they are stored.
  """
  if dtype is not None:
    dtype = parameter_dtype(dtype)
  tree: Params = {}
  for name, row in table.items():
    *parents, last = row.path
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    stored = fetch(name)
    if not isinstance(stored, Fp8Kernel):
      node[last] = place(stored, row.transpose, dtype)
    else:
      node[last] = stored
  return tree


def tie_head(params: Params) -> None:
  """Adds the head of a target that reuses its embedding, as its own array."""
  embedding = np.asarray(params["embedding"])
  params["head"] = {"kernel": place(embedding, True, embedding.dtype)}


def _leaves(tree: Params, path: Path = ()) -> Iterator[tuple[Path, Any]]:
  for key, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, (*path, key))
    else:
      yield (*path, key), value


def stored_tensors(
  table: Table, params: Params, dtype: Any, *, source: str
) -> dict[str, np.ndarray]:
  """The inverse of `build_tree`: named tensors as a file stores them.

  A kernel in 8 bits makes two, its scale as f32[F, 1] behind it. With a
  dtype of None the others stay as they are.

  Raises:
    ValueError: a dtype that parameters cannot have.
    WeightsError: the tree lacks a parameter of the table, has another one,
      or one of another shape.
  """
  if dtype is not None:
    dtype = parameter_dtype(dtype)
  leaves = dict(_leaves(params))
  names = {row.path: name for name, row in table.items()}
  found: dict[str, tuple[int, ...]] = {}
  for path, leaf in leaves.items():
    name = names.get(path, ".".join(map(str, path)))
    shape = tuple(np.shape(leaf))
    transpose = path in names and table[name].transpose
    found[name] = shape[::-1] if transpose else shape
  check_tensors(found, table, source=source)
  tensors: dict[str, np.ndarray] = {}
  for name, row in table.items():
    leaf = leaves[row.path]
    if isinstance(leaf, Fp8Kernel):
      tensors[name] = np.array(leaf.values, dtype=FP8, order="C")
      tensors[name + SCALE] = np.array(leaf.scale, dtype=np.float32)[:, None]
    else:
      stored = leaf.T if row.transpose else leaf
      tensors[name] = np.array(stored, dtype=dtype, order="C")
  return tensors
