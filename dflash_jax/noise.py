"""Random numbers by address: a stream, a request, a moment, a token.

A cipher turns an address into bits, so a draw depends on nothing but its
address: not on the batch, on how many tokens are verified together, or on what
was drawn before. Streams never mix: reusing a draft's noise to decide about it,
or to replace it, biases the output (vLLM #35461, #54282).

The moment of the target's own choice is the chosen token's position, so plain
decoding shares it. The moment of everything that a rejection rule draws is its
round's anchor, for the whole block: the block rule looks past the tokens that
it emits, so no later round may meet the same noise again.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.noise import bits_of


class Stream(enum.IntEnum):
  """What a draw is for."""

  CHOICE = 0
  DRAFT = 1
  ACCEPT = 2
  RECOVERY = 3
  BONUS = 4


def uniform(
  stream: Stream | jax.Array, seeds: jax.Array, moments: jax.Array, count: int
) -> jax.Array:
  """f32[..., count] in (0, 1], one row per address.

  Args:
    stream: of the draws; an array i32[...] where it differs by row.
    seeds: u32[...], one per request.
    moments: i32[...], broadcasting with seeds.
    count: draws per row.
  """
  bits = bits_of(stream, seeds, moments, count)
  return (bits.astype(jnp.float32) + 0.5) * np.float32(2.0**-32)


def race_times(
  stream: Stream | jax.Array, seeds: jax.Array, moments: jax.Array, count: int
) -> jax.Array:
  """f32[..., count] > 0, exponential with mean 1: how late a token arrives.

  argmax(w / times) is a draw from w / sum(w) (the exponential race; the
  Gumbel-max trick is its logarithm). 32-bit uniforms near 0 keep their relative
  precision, so that early arrivals, which decide races, are finely graded.
  Arguments as in `uniform`.
  """
  return -jnp.log1p(-uniform(stream, seeds, moments, count))
