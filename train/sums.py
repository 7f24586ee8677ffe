"""Sums over the slots of many blocks, and what they say of a drafter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from train import losses
from train.drafts import Drafts

BINS = 10  # of a confidence, for its calibration


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Right:
  """Greedy drafts that are right.

  Attributes:
    correct: f32[K'], supervised slots whose draft is the label.
    accepted: f32[], sum over blocks of the leading run of correct slots.
  """

  correct: jax.Array
  accepted: jax.Array

  @classmethod
  def of(cls, right: jax.Array, mask: jax.Array) -> "Right":
    """Of right bool[X, K'], in slots of mask bool[X, K']."""
    right = (right & mask).astype(jnp.float32)
    return cls(right.sum(axis=0), jnp.cumprod(right, axis=-1).sum())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaps:
  """How far a confidence is from the chance of acceptance.

  Attributes:
    error: f32[], sum of |confidence - chance|.
    bias: f32[BINS], sum of (confidence - chance) by confidence.
  """

  error: jax.Array
  bias: jax.Array

  @classmethod
  def of(cls, odds: jax.Array, chance: jax.Array, mask: jax.Array) -> "Gaps":
    """Of log-odds and chances f32[X, K'], in slots of mask bool[X, K']."""
    confidence = jax.nn.sigmoid(odds)
    gap = jnp.where(mask, confidence - chance, 0.0)
    bins = jnp.minimum((confidence * BINS).astype(jnp.int32), BINS - 1)
    return cls(jnp.abs(gap).sum(), jnp.zeros(BINS).at[bins].add(gap))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotSums:
  """Sums over blocks, which add up across pieces of a batch.

  Attributes:
    loss: f32[], sum of weight times cost. weight: f32[], sum of weights.
    terms: by name, f32[], the loss's terms without their coefficients.
    supervised: f32[K'], supervised slots.
    blocks: f32[], blocks with a supervised slot.
    right: drafts that are.
    plain: those that would be without corrector, if there is one.
    recalled: f32[], slots whose label is a selector's candidate.
    expected: f32[], drafts accepted on average at temperature 1, if taught.
    gaps: of a confidence head, if taught.
  """

  loss: jax.Array
  weight: jax.Array
  terms: dict[str, jax.Array]
  supervised: jax.Array
  blocks: jax.Array
  right: Right
  plain: Right | None
  recalled: jax.Array | None
  expected: jax.Array | None
  gaps: Gaps | None


def count(
  drafts: Drafts,
  columns: jax.Array,
  mask: jax.Array,
  chance: jax.Array | None,
) -> dict[str, Any]:
  """Everything of SlotSums that is no loss.

  Args:
    drafts: what the drafter says.
    columns: i32[X, K'], of the labels. mask: bool[X, K'].
    chance: f32[X, K'], of each draft's acceptance, if known.
  """
  plain = recalled = expected = gaps = None
  if drafts.corrected is not None or drafts.choice is not None:
    plain = Right.of(losses.is_best(drafts.plain, columns), mask)
  if drafts.choice is not None:
    found = drafts.choice.is_label(columns).any(axis=-1)
    recalled = (found & mask).sum(dtype=jnp.float32)
  if chance is not None:
    expected = losses.expected_length(chance, mask).sum()
    if drafts.odds is not None:
      gaps = Gaps.of(drafts.odds, chance, mask)
  return {
    "supervised": mask.sum(axis=0, dtype=jnp.float32),
    "blocks": mask.any(axis=-1).sum(dtype=jnp.float32),
    "right": Right.of(drafts.is_right(columns), mask),
    "plain": plain,
    "recalled": recalled,
    "expected": expected,
    "gaps": gaps,
  }


def summarize(sums: SlotSums) -> dict[str, jax.Array]:
  """What the sums say: only what the drafter and its loss can tell.

  loss, loss_TERM          with and without coefficients
  accuracy, plain_accuracy f32[K'], by slot; plain of the slots' own logits
  anchor_tau, plain_tau    mean leading run of right drafts, plus 1
  tau_tv                   the same at temperature 1, expected
  slots                    supervised
  selector_recall          slots whose label is a candidate
  selector_accuracy        of those, slots whose label is chosen
  confidence_error         mean |confidence - chance of acceptance|
  confidence_ece           expected calibration error, over ten bins
  """
  weight = jnp.maximum(sums.weight, 1e-6)
  by_slot = jnp.maximum(sums.supervised, 1.0)
  slots = jnp.maximum(sums.supervised.sum(), 1.0)
  blocks = jnp.maximum(sums.blocks, 1.0)
  values = {
    "loss": sums.loss / weight,
    "accuracy": sums.right.correct / by_slot,
    "anchor_tau": 1.0 + sums.right.accepted / blocks,
    "slots": sums.supervised.sum(),
  }
  if len(sums.terms) > 1:
    values |= {f"loss_{name}": x / weight for name, x in sums.terms.items()}
  if sums.plain is not None:
    values["plain_accuracy"] = sums.plain.correct / by_slot
    values["plain_tau"] = 1.0 + sums.plain.accepted / blocks
  if sums.recalled is not None:
    recalled = jnp.maximum(sums.recalled, 1.0)
    values["selector_recall"] = sums.recalled / slots
    values["selector_accuracy"] = sums.right.correct.sum() / recalled
  if sums.expected is not None:
    values["tau_tv"] = 1.0 + sums.expected / blocks
  if sums.gaps is not None:
    values["confidence_error"] = sums.gaps.error / slots
    values["confidence_ece"] = jnp.abs(sums.gaps.bias).sum() / slots
  return values
