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

from pallas_kernels.noise import race_times, uniform

__all__ = ["Stream", "at_depth", "race_times", "uniform"]


class Stream(enum.IntEnum):
  """What a draw is for."""

  CHOICE = 0
  DRAFT = 1
  ACCEPT = 2
  RECOVERY = 3
  BONUS = 4


def at_depth(stream: Stream, depths: jax.Array) -> jax.Array:
  """i32[...], a stream of its own for each depth of a block, from 1."""
  return stream + len(Stream) * (depths - 1)
