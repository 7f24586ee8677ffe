"""Attention of a block's queries over a long cache and the block itself."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import dispatch
from pallas_kernels.block_attention import (
  kernel_sm90,
  kernel_sm100,
  partials,
  reference,
)
from pallas_kernels.block_attention.config import (
  HEAD_WIDTHS,
  MAX_TOKENS,
  Config,
  choose_config,
)
from pallas_kernels.block_attention.partials import Partial
from pallas_kernels.block_attention.reference import Prefix
from pallas_kernels.block_attention.splits import WORD, Work

NAME = "block_attention"
COPIED_ROWS = 8  # what a copy engine takes at a time
Pair = tuple[jax.Array, jax.Array]  # keys and values
KERNELS = {"sm90": kernel_sm90.attend, "sm100": kernel_sm100.attend}


def block_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  past_key: jax.Array,
  past_value: jax.Array,
  length: jax.Array,
  ancestors: jax.Array | None = None,
  *,
  depths: jax.Array | None = None,
  prefix: Prefix | None = None,
  member: jax.Array | None = None,
  window: int | None = None,
  scale: float | None = None,
  sinks: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """Grouped-query attention of P new tokens over a cache and over each other.

  What a row gets does not depend, in a single bit, on how many rows or
  sequences there are: verification and plain decoding must not disagree.

  Args:
    query: f[B, P, N, H]; query head n reads key/value head n // (N / G).
    key, value: f[B, G, P, H] of the same P tokens.
    past_key, past_value: f[B, G, S, H] of the tokens before. Slots that are not
      committed are given no weight, but must hold finite values.
    length: i32[B], how many slots are committed; from 0 to S.
    ancestors: u32[B, P, W], which new keys a row sees: key j iff bit j % 32 of
      word j // 32 is set. Of a tree, its ancestors, as dflash_jax.tree packs
      them; of a drafter's block, any mask (reference.pack_mask). A row must see
      itself. None for a chain: row i sees keys j <= i.
    depths: i32[B, P], how far each row stands behind the cache; of a tree that
      has a window, the nodes' depths. None for row i at i.
    prefix: keys f[G, S0, H], values f[G, S0, H] and length i32[] of what all
      sequences begin with, before their caches. It is read once for all.
    member: bool[B], the sequences that begin with the prefix; None for all. Of
      others, positions begin with their caches.
    window: each row sees this many last positions, its own included; positions
      are prefix length + length + depth. Where there are `ancestors`, they
      alone say which new keys a row sees.
    scale: of the scores; 1 / sqrt(H) if None.
    sinks: f[N], of each query head the score of one more key, whose value is 0;
      not scaled.
    implementation: None for the fastest, or a name in dispatch.IMPLEMENTATIONS.

  Returns:
    f32[B, P, N, H]. Softmax and sums are float32.

  Raises:
    ValueError: arguments that no implementation takes.
    NotImplementedError: an implementation that cannot run here, or not on them.
  """
  arrays = (query, key, value, past_key, past_value, length, ancestors)
  _check(*arrays, depths, prefix, member, window, scale, sinks)
  limit = _kernel_limit(key, past_key, prefix)
  chosen, _ = dispatch.choose(NAME, implementation, limit)
  if chosen == "xla":
    return reference.block_attention(
      *arrays,
      depths=depths,
      prefix=prefix,
      member=member,
      window=window,
      scale=scale,
      sinks=sinks,
    )
  with jax.named_scope(NAME):
    return run_kernel(
      chosen,
      *arrays,
      depths=depths,
      prefix=prefix,
      member=member,
      window=window,
      scale=scale,
      sinks=sinks,
    )


def run_kernel(
  architecture: str,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  past_key: jax.Array,
  past_value: jax.Array,
  length: jax.Array,
  ancestors: jax.Array | None,
  *,
  prefix: Prefix | None,
  window: int | None,
  scale: float | None,
  depths: jax.Array | None = None,
  member: jax.Array | None = None,
  sinks: jax.Array | None = None,
  config: Config | None = None,
  interpret: object = None,
) -> jax.Array:
  """Packs rows, runs a kernel over each cache, and merges what splits found."""
  B, P, N, H = query.shape
  G = key.shape[1]
  rows = partials.pack(query.astype(key.dtype), G)
  oldest = reference.oldest_visible(P, length, window, depths)
  if oldest is not None:
    oldest = partials.by_row(oldest, N // G)
  attend = functools.partial(
    _attend,
    architecture,
    scale=scale or 1 / math.sqrt(H),
    config=config,
    interpret=interpret,
  )
  block = Block(
    keys_values=(_by_head(key), _by_head(value)),
    num_keys=P,
    bits=partials.by_row(partials.mask_bits(P, ancestors, window), N // G),
  )
  past = _by_head(past_key), _by_head(past_value)
  parts = [attend(rows, past, length, oldest, block)]
  if prefix is not None:
    prefix_key, prefix_value, prefix_length = prefix
    prefix_length = jnp.reshape(prefix_length, (1,))
    if oldest is not None:
      oldest = (prefix_length + oldest).reshape(1, -1)
    folded = partials.fold_batch(rows, B)
    shared = prefix_key, prefix_value
    part = attend(folded, shared, prefix_length, oldest, None)
    part = partials.unfold_batch(part, B)
    if member is not None:
      part = partials.drop(part, ~jnp.repeat(member, G))
    parts.insert(0, part)
  if sinks is not None:
    parts.append(partials.of_sinks(sinks, rows, B))
  return partials.unpack(partials.merge(parts), B, P)


class Block(NamedTuple):
  """New tokens.

  Attributes:
    keys_values: f[X, P, H] each.
    num_keys: P.
    bits: i32[B or 1, W, R], which keys each row sees.
  """

  keys_values: Pair
  num_keys: int
  bits: jax.Array


def _attend(
  architecture: str,
  rows: jax.Array,
  past: Pair,
  length: jax.Array,
  oldest: jax.Array | None,
  block: Block | None,
  *,
  scale: float,
  config: Config | None,
  interpret: object,
) -> Partial:
  """Attention of rows f[X, R, H] over a cache, and the block if any.

  X is a multiple of the number of lengths; oldest i32[B, R] is the first slot
  that each row sees.
  """
  heads, num_rows, H = rows.shape
  config = config or choose_config(architecture, num_rows, H)
  slots, sequences = past[0].shape[1], len(length)
  work = Work(
    config=config,
    heads=heads,
    heads_per_sequence=heads // sequences,
    num_rows=_whole(num_rows, COPIED_ROWS),
    head_width=H,
    splits=pl.cdiv(slots, config.split_slots),
    block_keys=block.num_keys if block else 0,
    windowed=oldest is not None,
    scale=scale,
  )
  length = jnp.clip(length, 0, slots)
  lowest = jnp.zeros_like(length) if oldest is None else oldest.min(axis=-1)
  if oldest is None:
    oldest = jnp.zeros((sequences, num_rows), jnp.int32)
  num_words = _whole(work.block_keys, config.tile_slots) // WORD
  bits = block.bits if block else jnp.zeros((1, 1, num_rows), jnp.int32)
  bits = _pad(bits, 1, max(num_words, 1))
  bits = jnp.broadcast_to(bits, (sequences, *bits.shape[1:]))
  padded = work.row_tiles * config.rows
  key, value = block.keys_values if block else past
  new_keys = _whole(key.shape[1], COPIED_ROWS)
  out, total = KERNELS[architecture](
    work,
    _pad(rows, 1, work.num_rows),
    past,
    (_pad(key, 1, new_keys), _pad(value, 1, new_keys)),
    jnp.stack([lowest, length], axis=-1).astype(jnp.int32),
    (_pad(bits, 2, padded), _pad(oldest.astype(jnp.int32), 1, padded)),
    interpret,
  )
  return Partial(out[:, :, :num_rows], total[:, :, :num_rows])


def _by_head(x: jax.Array) -> jax.Array:
  """[B, G, ...] -> [B * G, ...]."""
  return x.reshape(-1, *x.shape[2:])


def _whole(count: int, unit: int) -> int:
  """The next multiple of a unit."""
  return pl.cdiv(count, unit) * unit


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
  """Zeros at the end of an axis, up to a size."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths)


def _check(
  query,
  key,
  value,
  past_key,
  past_value,
  length,
  ancestors,
  depths,
  prefix,
  member,
  window,
  scale,
  sinks,
) -> None:
  """Raises ValueError for what nobody could compute."""

  def refuse(what: str):
    raise ValueError(f"{NAME}: {what}")

  if query.ndim != 4 or past_key.ndim != 4 or not query.size:
    refuse(
      f"query {query.shape} must be [B, P, N, H], past_key {past_key.shape} "
      "[B, G, S, H]"
    )
  B, P, N, H = query.shape
  G, S = past_key.shape[1:3]
  if not G or N % G:
    refuse(f"{N} query heads are not a multiple of {G} key/value heads")
  wanted = {
    "key": (key, (B, G, P, H)),
    "value": (value, (B, G, P, H)),
    "past_key": (past_key, (B, G, S, H)),
    "past_value": (past_value, (B, G, S, H)),
    "length": (length, (B,)),
  }
  floats = {"query": query, "key": key, "value": value}
  floats |= {"past_key": past_key, "past_value": past_value}
  whole = {"length": length}
  if ancestors is not None:
    wanted["ancestors"] = (ancestors, (B, P, pl.cdiv(P, WORD)))
    if ancestors.dtype != jnp.uint32:
      refuse(f"ancestors is {ancestors.dtype}; use uint32")
  if prefix is not None:
    names = "prefix key", "prefix value", "prefix length"
    shared = dict(zip(names, map(jnp.asarray, prefix), strict=True))
    count = shared["prefix key"].shape[-2:-1] or (0,)
    for name in names[:2]:
      wanted[name] = (shared[name], (G, *count, H))
    wanted[names[2]] = (shared[names[2]], ())
    whole["prefix length"] = shared.pop("prefix length")
    floats |= shared
  if depths is not None:
    wanted["depths"] = (depths, (B, P))
    whole["depths"] = depths
  if sinks is not None:
    wanted["sinks"] = (sinks, (N,))
    if not jnp.issubdtype(sinks.dtype, jnp.floating):
      refuse(f"sinks is {sinks.dtype}; use a floating-point type")
  if member is not None:
    if prefix is None:
      refuse("member says who begins with a prefix, and there is none")
    wanted["member"] = (member, (B,))
    if member.dtype != jnp.bool_:
      refuse(f"member is {member.dtype}; use bool")
  for name, (array, shape) in wanted.items():
    if array.shape != shape:
      refuse(f"{name} has shape {array.shape}; query and past_key ask {shape}")
  for name, array in floats.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      refuse(f"{name} is {array.dtype}; use a floating-point type")
    if name != "query" and array.dtype != key.dtype:
      refuse(f"{name} is {array.dtype}, but key is {key.dtype}")
  for name, array in whole.items():
    if not jnp.issubdtype(array.dtype, jnp.integer):
      refuse(f"{name} is {array.dtype}; use a type of whole numbers")
  if window is not None and window < 1:
    refuse(f"window={window}; use at least 1, or None")
  if scale is not None and not scale > 0:
    refuse(f"scale={scale}; use more than 0, or None")


def _kernel_limit(key, past_key, prefix) -> str | None:
  """Why kernels cannot take these arguments, if so."""
  P, H = key.shape[2:]
  if key.dtype != jnp.bfloat16:
    return f"kernels take bfloat16 keys and values, not {key.dtype}"
  if H not in HEAD_WIDTHS:
    return f"kernels take heads of width {HEAD_WIDTHS}, not {H}"
  if P > MAX_TOKENS:
    return f"kernels take up to {MAX_TOKENS} new tokens, not {P}"
  for name, cache in (
    ("past_key", past_key),
    ("prefix key", (prefix or [None])[0]),
  ):
    if cache is not None and (
      not cache.shape[-2] or cache.shape[-2] % COPIED_ROWS
    ):
      return (
        f"kernels take a multiple of {COPIED_ROWS} slots, not {name} "
        f"{cache.shape}"
      )
  return None
