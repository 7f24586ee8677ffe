"""Losses over the slots of a block, and the weights that shape them.

Every loss is sum(w CE) / sum(w) with w detached; only the weights differ.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dflash_jax.config import ConfigError, TrainConfig

DECAYS = {16: 7.0, 10: 5.0, 8: 4.0}  # arXiv 2602.06036: gamma by block size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSums:
  """Sums over blocks, which add up across pieces of a batch.

  Attributes:
    loss: f32[], sum of weight times cross-entropy.
    weight: f32[], sum of weights.
    correct: f32[K - 1], supervised slots whose argmax is the label.
    supervised: f32[K - 1], supervised slots.
    accepted: f32[], sum over blocks of the leading run of correct slots.
    blocks: f32[], blocks with a supervised slot.
  """

  loss: jax.Array
  weight: jax.Array
  correct: jax.Array
  supervised: jax.Array
  accepted: jax.Array
  blocks: jax.Array


def decay_weights(block_size: int, gamma: float) -> jax.Array:
  """f32[K - 1]: exp(-(k - 1) / gamma), k = 1..K-1; gamma 0 takes the paper's.

  Source: DFlash, arXiv 2602.06036, section 4; gamma 7, 5, 4 at K = 16, 10, 8.
  """
  if not gamma:
    gamma = DECAYS.get(block_size, block_size / 2)
  return jnp.exp(-jnp.arange(block_size - 1) / gamma)


def dpace_weights(
  cross_entropy: jax.Array, mask: jax.Array, alpha: float
) -> jax.Array:
  """f32[..., K - 1]: how much of the accepted length hangs on each slot.

  w_j = sum_{m >= j} prod_{i <= m} q_i, with q_i = (1 - alpha) p_i + alpha, p_i
  the probability given to label i, over supervised slots. The derivative of the
  expected accepted length by log q_j is exactly this sum.
  Source: D-PACE, arXiv 2605.18810, equation for w_j; alpha 0.5.
  """
  smoothed = (1 - alpha) * jnp.exp(-cross_entropy) + alpha
  survival = jnp.cumprod(jnp.where(mask, smoothed, 0.0), axis=-1)
  reverse_sum = jnp.cumsum(survival[..., ::-1], axis=-1)[..., ::-1]
  return jax.lax.stop_gradient(reverse_sum)


def is_best(logits: jax.Array, columns: jax.Array) -> jax.Array:
  """Whether no logit beats the label's; logits f32[..., V'], columns i32[...].

  A maximum and a look-up: an argmax costs a CPU more than the head's matmul.
  """
  index = jnp.maximum(columns, 0)[..., None]
  label = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
  return (label >= logits.max(axis=-1)) & (columns >= 0)


def slot_sums(
  logits: jax.Array,
  columns: jax.Array,
  mask: jax.Array,
  config: TrainConfig,
  teacher: jax.Array | None = None,
) -> SlotSums:
  """The loss and its company, over blocks.

  Args:
    logits: f32[X, K - 1, V'].
    columns: i32[X, K - 1], the label's column; -1 where a trimmed head lacks
      it: such a slot can never be right, carries no loss, and breaks a run.
    mask: bool[X, K - 1], supervised slots.
    config: names the loss.
    teacher: f32[X, K - 1, V'], the target's logits of the same tokens, for a
      config with a teacher_share.

  Raises:
    ConfigError: for an unknown loss.
  """
  K = mask.shape[-1] + 1
  known = mask & (columns >= 0)
  top = jax.nn.logsumexp(logits, axis=-1)
  index = jnp.maximum(columns, 0)[..., None]
  label = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
  cross_entropy = jnp.where(known, top - label, 0.0)
  if config.loss == "ce":
    weights = jnp.broadcast_to(decay_weights(K, config.decay), mask.shape)
  elif config.loss == "dpace":
    surprise = jnp.where(known, cross_entropy, jnp.inf)
    weights = dpace_weights(surprise, mask, config.dpace_alpha)
  else:
    raise ConfigError(
      f"train.loss={config.loss!r} is unknown; choose 'ce' or 'dpace'"
    )
  weights = jnp.where(known, weights, 0.0)
  if teacher is not None:
    likely = jax.nn.softmax(jax.lax.stop_gradient(teacher), axis=-1)
    soft = top - (likely * logits).sum(axis=-1)
    share = config.teacher_share
    cross_entropy = (1 - share) * cross_entropy + share * soft
  correct = is_best(logits, columns) & known
  run = jnp.cumprod(correct.astype(jnp.float32), axis=-1)
  return SlotSums(
    loss=(weights * cross_entropy).sum(),
    weight=weights.sum(),
    correct=correct.sum(axis=0, dtype=jnp.float32),
    supervised=mask.sum(axis=0, dtype=jnp.float32),
    accepted=run.sum(),
    blocks=mask.any(axis=-1).sum(dtype=jnp.float32),
  )
