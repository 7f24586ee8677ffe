"""Noise by address: for plain XLA code, and in a kernel's registers.

The two are equal, bit for bit in the cipher and within float32 rounding in the
logarithm, so a token that a kernel samples is the token that XLA samples.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
SMALL, TERMS = 1 / 8, 8  # below, -log(1 - u) is summed as a series


def threefry(
  key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Threefry-2x32 with 20 rounds of u32 arrays, all of one shape.

  Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011.
  """
  keys = (*key, key[0] ^ key[1] ^ jnp.uint32(PARITY))
  first, second = counter[0] + keys[0], counter[1] + keys[1]
  for group in range(5):
    for distance in ROTATIONS[group % 2]:
      first = first + second
      second = first ^ _rotate(second, distance)
    first = first + keys[(group + 1) % 3]
    second = second + keys[(group + 2) % 3] + jnp.uint32(group + 1)
  return first, second


def _rotate(x: jax.Array, distance: int) -> jax.Array:
  left = lax.shift_left(x, jnp.full_like(x, distance))
  return left | lax.shift_right_logical(x, jnp.full_like(x, 32 - distance))


def bits_of(
  stream: int | jax.Array, seeds: jax.Array, moments: jax.Array, count: int
) -> jax.Array:
  """u32[..., count]: the cipher of (pair, stream), keyed by (seed, moment).

  A block of the cipher serves numbers i and i + half, half of count rounded up.
  Arguments as in `uniform`.
  """
  pairs = jnp.arange(-(-count // 2), dtype=jnp.uint32)
  shape = (*jnp.broadcast_shapes(seeds.shape, moments.shape), len(pairs))

  def spread(word: jax.Array) -> jax.Array:
    return jnp.broadcast_to(word.astype(jnp.uint32), shape)

  halves = threefry(
    (spread(seeds[..., None]), spread(moments[..., None])),
    (spread(pairs), spread(jnp.asarray(stream)[..., None])),
  )
  return jnp.concatenate(halves, axis=-1)[..., :count]


def uniform(
  stream: int | jax.Array, seeds: jax.Array, moments: jax.Array, count: int
) -> jax.Array:
  """f32[..., count] in (0, 1], one row per address; for plain XLA code.

  Args:
    stream: of the draws; an array i32[...] where it differs by row.
    seeds: u32[...], one per request.
    moments: i32[...], broadcasting with seeds.
    count: draws per row.
  """
  bits = bits_of(stream, seeds, moments, count)
  return (bits.astype(jnp.float32) + 0.5) * np.float32(2.0**-32)


def race_times(
  stream: int | jax.Array, seeds: jax.Array, moments: jax.Array, count: int
) -> jax.Array:
  """f32[..., count] > 0, exponential with mean 1: how late a token arrives.

  argmax(w / times) is a draw from w / sum(w) (the exponential race; the
  Gumbel-max trick is its logarithm). 32-bit uniforms near 0 keep their relative
  precision, so that early arrivals, which decide races, are finely graded.
  Arguments as in `uniform`.
  """
  return -jnp.log1p(-uniform(stream, seeds, moments, count))


def race_times_at(
  seeds: jax.Array,
  moments: jax.Array,
  ids: jax.Array,
  *,
  stream: int,
  vocabulary: int,
) -> jax.Array:
  """The same of single tokens, in a kernel's registers: f32, one per element.

  Args:
    seeds, moments: u32, the address of a row, spread over its tokens.
    ids: i32, the token of each element, all arguments of one shape.
    stream: what the draws are for.
    vocabulary: V; a cipher block serves tokens i and i + ceil(V / 2).
  """
  half = -(-vocabulary // 2)
  is_second = ids >= half
  pairs = jnp.where(is_second, ids - half, ids).astype(jnp.uint32)
  streams = jnp.full_like(pairs, stream)
  first, second = threefry((seeds, moments), (pairs, streams))
  return _exponential(jnp.where(is_second, second, first))


def _exponential(bits: jax.Array) -> jax.Array:
  """-log(1 - u), u = (bits + 0.5) / 2^32, finely graded near 0."""
  high = lax.shift_right_logical(bits, jnp.full_like(bits, 16))
  low = bits & jnp.uint32(0xFFFF)
  number = high.astype(jnp.int32).astype(jnp.float32) * np.float32(65536)
  number = number + low.astype(jnp.int32).astype(jnp.float32)
  u = (number + np.float32(0.5)) * np.float32(2.0**-32)
  series = jnp.full_like(u, 1 / TERMS)
  for order in range(TERMS - 1, 0, -1):
    series = series * u + np.float32(1 / order)
  return jnp.where(u < SMALL, series * u, -jnp.log(1 - u))
