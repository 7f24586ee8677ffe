"""What a slot of a block costs, and how much it counts: formulas alone.

Notation: p is the target's law of a slot, q the drafter's; alpha, the sum of
min(p, q), is the chance that a draft drawn from q is accepted (Leviathan et al.
2023, arXiv 2211.17192, section 3), TV = 1 - alpha their total variation.
Nothing here knows a drafter; train/objective.py puts the pieces together.
"""

import jax
import jax.numpy as jnp

# gamma by the number of drafts: arXiv 2602.06036 has 7, 5, 4 for blocks of 16,
# 10, 8 with their anchors; DSpark, arXiv 2607.05147, has 4 for 7 drafts.
DECAYS = {16: 7.0, 15: 7.0, 9: 5.0, 7: 4.0}


# --- What a slot counts -------------------------------------------------------


def decay_weights(num_drafts: int, gamma: float) -> jax.Array:
  """f32[K']: exp(-(k - 1) / gamma), k = 1..K'; gamma 0 takes the papers'.

  Source: DFlash, arXiv 2602.06036, section 4.
  """
  if not gamma:
    gamma = DECAYS.get(num_drafts, (num_drafts + 1) / 2)
  return jnp.exp(-jnp.arange(num_drafts) / gamma)


def dpace_weights(
  cross_entropy: jax.Array, mask: jax.Array, alpha: float
) -> jax.Array:
  """f32[..., K']: how much of the accepted length hangs on each slot.

  w_j = sum_{m >= j} prod_{i <= m} q_i, with q_i = (1 - alpha) p_i + alpha, p_i
  the probability given to label i, over supervised slots. The derivative of the
  expected accepted length by log q_j is exactly this sum.
  Source: D-PACE, arXiv 2605.18810, equation for w_j; alpha 0.5.
  """
  smoothed = (1 - alpha) * jnp.exp(-cross_entropy) + alpha
  survival = jnp.cumprod(jnp.where(mask, smoothed, 0.0), axis=-1)
  reverse_sum = jnp.cumsum(survival[..., ::-1], axis=-1)[..., ::-1]
  return jax.lax.stop_gradient(reverse_sum)


# --- What a slot costs --------------------------------------------------------


def take(logits: jax.Array, columns: jax.Array) -> jax.Array:
  """logits f32[..., V'] at columns i32[...]; a column of -1 reads the first."""
  index = jnp.maximum(columns, 0)[..., None]
  return jnp.take_along_axis(logits, index, axis=-1)[..., 0]


def cross_entropy(logits: jax.Array, columns: jax.Array) -> jax.Array:
  """f32[...]: -log q(label) of logits f32[..., V'], labels i32[...]."""
  return jax.nn.logsumexp(logits, axis=-1) - take(logits, columns)


def kl(logits: jax.Array, teacher: jax.Array) -> jax.Array:
  """f32[...]: KL(p || q) of logits f32[..., V'] and teacher log p.

  Source: Hinton et al. 2015, arXiv 1503.02531, at temperature 1.
  """
  p = jnp.exp(teacher)
  gap = teacher - jax.nn.log_softmax(logits, axis=-1)
  return jnp.where(p > 0, p * gap, 0.0).sum(axis=-1)


def overlap(logits: jax.Array, teacher: jax.Array) -> jax.Array:
  """f32[...]: alpha, of logits f32[..., V'] and teacher log p."""
  q = jax.nn.softmax(logits, axis=-1)
  return jnp.minimum(jnp.exp(teacher), q).sum(axis=-1)


def lk_hybrid(divergence: jax.Array, alpha: jax.Array) -> jax.Array:
  """f32[...]: lambda KL + (1 - lambda) TV, lambda = exp(-3 alpha), detached.

  KL leads while the two laws hardly meet, TV once they do.
  Source: LK losses, arXiv 2602.23881, the hybrid with eta 3.
  """
  share = jnp.exp(-3 * jax.lax.stop_gradient(alpha))
  return share * divergence + (1 - share) * (1 - alpha)


def expected_length(alpha: jax.Array, mask: jax.Array) -> jax.Array:
  """f32[...]: E[accepted drafts] of a block, sum_j prod_{i <= j} alpha_i.

  alpha f32[..., K'] over supervised slots, mask bool[..., K'].
  Source: arXiv 2211.17192; as a loss, "end-to-end TV", arXiv 2607.25852.
  """
  return jnp.cumprod(jnp.where(mask, alpha, 0.0), axis=-1).sum(axis=-1)


def calibration(odds: jax.Array, chance: jax.Array) -> jax.Array:
  """f32[...]: binary cross-entropy of log-odds towards a chance in 0..1.

  Source: DSpark, arXiv 2607.05147: c -> 1 - |p - q| / 2 summed, detached.
  """
  return jax.nn.softplus(odds) - odds * jax.lax.stop_gradient(chance)


def pick(
  scores: jax.Array, is_label: jax.Array, label_score: jax.Array | None
) -> jax.Array:
  """f32[...]: cross-entropy of a selector's K-way choice.

  Source: DFlash 2's loss is unpublished. Of the reconstructions, NeMo Automodel
  drops a slot whose label is no candidate; speculators and SpecForge put the
  label in the last candidate's place, in the loss alone.

  Args:
    scores: f32[..., k], best candidate first.
    is_label: bool[..., k], at most one of them.
    label_score: f32[...] to overwrite the last candidate with where none is the
      label; None drops such slots, at a cost of 0.
  """
  found = is_label.any(axis=-1)
  if label_score is not None:
    last = jnp.where(found, scores[..., -1], label_score)
    scores = jnp.concatenate([scores[..., :-1], last[..., None]], axis=-1)
    is_last = jnp.arange(scores.shape[-1]) == scores.shape[-1] - 1
    is_label = jnp.where(found[..., None], is_label, is_last)
    found = jnp.ones_like(found)
  chosen = jnp.where(is_label, scores, 0.0).sum(axis=-1)
  return jnp.where(found, jax.nn.logsumexp(scores, axis=-1) - chosen, 0.0)


def is_best(logits: jax.Array, columns: jax.Array) -> jax.Array:
  """Whether no logit beats the label's; logits f32[..., V'], columns i32[...].

  A maximum and a look-up: an argmax costs a CPU more than the head's matmul.
  """
  return (take(logits, columns) >= logits.max(axis=-1)) & (columns >= 0)
