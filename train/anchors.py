"""Where blocks start, and which of their slots are supervised."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
  """Training blocks of a batch of sequences.

  Attributes:
    anchors: i32[B, A], sorted positions of each block's clean token.
    labels: i32[B, A, K - 1], the token at anchor + 1, ..., anchor + K - 1.
    mask: bool[B, A, K - 1], slots that count.
  """

  anchors: jax.Array
  labels: jax.Array
  mask: jax.Array


def draw_anchors(
  key: jax.Array, loss_mask: jax.Array, num_anchors: int
) -> tuple[jax.Array, jax.Array]:
  """Random anchors, without replacement, sorted.

  A position is an anchor if it and its successor are supervised: in decoding
  the first anchor is the reply's first token. The number of slots is fixed, so
  sequences with fewer candidates leave some blocks invalid. Random anchors beat
  a fixed partition by 14-19% accepted length (DFlash, arXiv 2602.06036).

  Args:
    key: redrawn every step.
    loss_mask: bool[B, S].
    num_anchors: A.

  Returns:
    anchors i32[B, A] and which of them are valid, bool[B, A].
  """
  B, S = loss_mask.shape
  A = min(num_anchors, S)
  candidate = loss_mask & jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
  score = jax.random.uniform(key, (B, S)) + candidate
  best, anchors = jax.lax.top_k(score, A)
  anchors = jnp.where(best >= 1.0, anchors, S)  # invalid ones sort last
  anchors = jnp.sort(anchors, axis=1)
  anchors = jnp.pad(anchors, ((0, 0), (0, num_anchors - A)), constant_values=S)
  valid = anchors < S
  return jnp.where(valid, anchors, 0).astype(jnp.int32), valid


def cut_blocks(
  tokens: jax.Array,
  loss_mask: jax.Array,
  anchors: jax.Array,
  valid: jax.Array,
  block_size: int,
) -> Blocks:
  """Labels of each block, supervised while the answer runs on unbroken.

  Args:
    tokens: i32[B, S]. loss_mask: bool[B, S].
    anchors: i32[B, A]. valid: bool[B, A].
    block_size: K.
  """
  B, A = anchors.shape
  _, S = tokens.shape
  positions = anchors[..., None] + jnp.arange(1, block_size)
  inside = positions < S
  index = jnp.minimum(positions, S - 1).reshape(B, -1)
  labels = jnp.take_along_axis(tokens, index, axis=1).reshape(B, A, -1)
  supervised = jnp.take_along_axis(loss_mask, index, axis=1).reshape(B, A, -1)
  run = jnp.cumprod((inside & supervised).astype(jnp.int32), axis=-1)
  return Blocks(
    anchors=anchors, labels=labels, mask=(run == 1) & valid[..., None]
  )


def every_anchor(loss_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
  """All S positions as anchors i32[B, S], and which are valid bool[B, S]."""
  B, S = loss_mask.shape
  valid = loss_mask & jnp.roll(loss_mask, -1, axis=1).at[:, -1].set(False)
  anchors = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
  return anchors, valid
