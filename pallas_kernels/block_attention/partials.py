"""From the operation's arrays to rows of queries, and from parts to a whole."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.block_attention.reference import block_mask, pack_mask
from pallas_kernels.block_attention.splits import LOWEST

ADDED_AT_ONCE = 8  # parts


class Partial(NamedTuple):
  """Attention over some of the keys, with more of it along the first axis.

  Attributes:
    out: f32[C, ..., H]; undefined where a row saw no key at all.
    total: f32[C, ...], the logarithm to base 2 of the softmax's total; LOWEST
      where a row saw no key at all.
  """

  out: jax.Array
  total: jax.Array


def merge(parts: list[Partial]) -> jax.Array:
  """f32[..., H]: attention over the union of disjoint keys."""
  tops = [part.total.max(axis=0) for part in parts]
  top = jnp.stack(tops).max(axis=0)
  out, total = jnp.float32(0), jnp.float32(0)
  for part in parts:
    weights = jnp.exp2(part.total - top)
    counts = (part.total > LOWEST)[..., None]
    weighted = jnp.where(counts, part.out * weights[..., None], 0)
    out, total = out + _add_up(weighted), total + _add_up(weights)
  return out / total[..., None]


def drop(part: Partial, void: jax.Array) -> Partial:
  """A part that void bool[X] of its heads f[C, X, ...] have no keys in."""
  nothing = jnp.where(void[:, None], LOWEST, part.total)
  return Partial(part.out, nothing)


def of_sinks(sinks: jax.Array, rows: jax.Array, batch: int) -> Partial:
  """The part of keys without a value, one for each query head.

  Args:
    sinks: f[N], their scores.
    rows: f[B * G, N / G * P, H], as `pack` gives them.
    batch: B.
  """
  heads, count, _ = rows.shape
  num_kv_heads = heads // batch
  per_head = sinks.astype(jnp.float32).reshape(num_kv_heads, -1, 1)
  num_tokens = count // per_head.shape[1]
  total = jnp.broadcast_to(
    per_head, (batch, *per_head.shape[:2], num_tokens)
  ).reshape(1, heads, count)
  return Partial(jnp.zeros((1, *rows.shape)), total * math.log2(math.e))


def _add_up(terms: jax.Array) -> jax.Array:
  """The sum over the first axis, in an order that no other axis can change.

  Of a reduction, the compiler chooses the order by all of its sizes; then a
  row's sum would depend on how many rows there are.
  """
  while len(terms) > 1:
    missing = -len(terms) % ADDED_AT_ONCE
    terms = jnp.pad(terms, ((0, missing), *[(0, 0)] * (terms.ndim - 1)))
    terms = terms.reshape(-1, ADDED_AT_ONCE, *terms.shape[1:])
    terms = sum(
      (terms[:, index] for index in range(1, ADDED_AT_ONCE)), terms[:, 0]
    )
  return terms[0]


def pack(query: jax.Array, num_kv_heads: int) -> jax.Array:
  """f[B, P, N, H] -> f[B * G, N / G * P, H], the rows of each kv head."""
  B, P, N, H = query.shape
  G = num_kv_heads
  rows = query.reshape(B, P, G, N // G, H).transpose(0, 2, 3, 1, 4)
  return rows.reshape(B * G, (N // G) * P, H)


def unpack(rows: jax.Array, batch: int, num_tokens: int) -> jax.Array:
  """f[B * G, N / G * P, H] -> f[B, P, N, H]."""
  width = rows.shape[-1]
  rows = rows.reshape(batch, -1, num_tokens, width).transpose(0, 2, 1, 3)
  return rows.reshape(batch, num_tokens, -1, width)


def fold_batch(rows: jax.Array, batch: int) -> jax.Array:
  """f[B * G, R, H] -> f[G, B * R, H], for keys that the batch shares."""
  heads, count, width = rows.shape
  rows = rows.reshape(batch, heads // batch, count, width).swapaxes(0, 1)
  return rows.reshape(heads // batch, batch * count, width)


def unfold_batch(part: Partial, batch: int) -> Partial:
  """What fold_batch's rows got, as rows of B * G heads again."""

  def unfold(x: jax.Array) -> jax.Array:
    C, G, rows = x.shape[:3]
    x = x.reshape(C, G, batch, rows // batch, *x.shape[3:]).swapaxes(1, 2)
    return x.reshape(C, batch * G, rows // batch, *x.shape[4:])

  return Partial(unfold(part.out), unfold(part.total))


def mask_bits(
  num_tokens: int, ancestors: jax.Array | None, window: int | None
) -> jax.Array:
  """i32[B or 1, W, P]: bit j % 32 of word j // 32 of row i, if i sees key j."""
  words = pack_mask(block_mask(num_tokens, ancestors, window))
  return jax.lax.bitcast_convert_type(words.swapaxes(1, 2), jnp.int32)


def by_row(per_token: jax.Array, repeats: int) -> jax.Array:
  """[..., P] -> [..., R]: for each packed row, that of its token."""
  return jnp.concatenate([per_token] * repeats, axis=-1)
