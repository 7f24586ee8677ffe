"""What a run minimises: named terms, weighted over the slots of each block.

    ce           cross-entropy of the answer's token
    kl           KL(p || q) against the target's law p
    tv           1 - sum min(p, q), half of |p - q|: the chance of a rejection
    lk           KL while p and q hardly meet, tv once they do
    e2e          1 - E[accepted drafts] / drafts of the block
    confidence   of a confidence head, towards 1 - tv
    selector     of a selector, its choice among the likeliest tokens

Every term is sum(w cost) / sum(w), with the slot weights w detached; e2e is of
a block, which weighs as much as its slots together. ce, kl, tv, lk and e2e
train the slots' logits: the corrected ones where a head corrects them, mixed
with the slots' own as the curriculum says. train/losses.py has the formulas and
their sources.

Published mixtures: "ce" (DFlash, with decay; D-PACE; Domino, with a curriculum
of 1), "0.1*ce + 1.8*tv + confidence" (DSpark, whose 0.9 is of |p - q|), "ce +
selector" (DFlash 2, reconstructed), "kl" (JetSpec, uniform weights; EAGLE-3,
with decay), "ce + kl" (a small language model, uniform weights), "e2e".
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from dflash_jax.config import ConfigError, TrainConfig
from train import losses
from train.drafts import Choice, Drafts
from train.sums import SlotSums, count

LAW_TERMS = ("ce", "kl", "tv", "lk", "e2e")
TERMS = (*LAW_TERMS, "confidence", "selector")
TAUGHT = frozenset(("kl", "tv", "lk", "e2e", "confidence"))
SLOT_WEIGHTS = ("uniform", "decay", "dpace")
SELECTOR_MISSES = ("drop", "overwrite")

_TERM = re.compile(r"(?:([0-9.]+(?:e-?[0-9]+)?) *\* *)?([a-z0-9]+)")


@dataclasses.dataclass(frozen=True)
class Objective:
  """A TrainConfig's loss, read.

  Attributes:
    terms: (name, coefficient) of each.
    slot_weights, decay, dpace_alpha, curriculum, selector_misses: as there.
  """

  terms: tuple[tuple[str, float], ...]
  slot_weights: str
  decay: float
  dpace_alpha: float
  curriculum: float
  selector_misses: str

  @classmethod
  def of(cls, config: TrainConfig) -> "Objective":
    """Reads config.loss.

    Raises:
      ConfigError: for a loss that is none, by its term.
    """
    return cls(
      terms=_parse(config.loss),
      slot_weights=config.slot_weights,
      decay=config.decay,
      dpace_alpha=config.dpace_alpha,
      curriculum=config.curriculum,
      selector_misses=config.selector_misses,
    )

  @property
  def needs_teacher(self) -> bool:
    """Whether the target's law must be known at each slot."""
    return any(name in TAUGHT for name, _ in self.terms)

  def check_drafter(self, drafter: Any) -> None:
    """Refuses a loss that trains what the drafter lacks, or leaves a part out.

    Args:
      drafter: its configuration, of whatever kind.

    Raises:
      ConfigError: naming the term and the part.
    """
    names = {name for name, _ in self.terms}
    for part in ("selector", "confidence"):
      has = getattr(drafter, part, None) is not None
      if part in names and not has:
        raise ConfigError(
          f"train.loss trains a {part}, and the drafter has none; leave the "
          f"term '{part}' out or take a drafter.name that has one"
        )
      if has and part not in names:
        raise ConfigError(
          f"the drafter's {part} would never learn; add '+ {part}' to "
          f"train.loss or leave the {part} out of the drafter"
        )
    bends = [getattr(drafter, part, None) for part in ("markov", "gru")]
    if self.curriculum and not any(bends):
      raise ConfigError(
        f"train.curriculum={self.curriculum} moves from plain logits to "
        "corrected ones, and the drafter corrects none; use 0 or a drafter "
        "with a Markov or GRU head"
      )

  def plain_share(self, progress: jax.Array) -> jax.Array | float:
    """Domino's lambda: the share of the slots' own logits in the loss.

    Linear from 1 to 0 over the curriculum's part of training.
    Source: Domino, arXiv 2605.29707, base-anchored curriculum.

    Args:
      progress: f32[], share of the steps that are done.
    """
    if not self.curriculum:
      return 0.0
    return jnp.maximum(1 - progress / self.curriculum, 0.0)

  def weigh(
    self, surprise: jax.Array, mask: jax.Array, known: jax.Array
  ) -> jax.Array:
    """f32[X, K']: what each slot counts; 0 where its label is not known.

    Args:
      surprise: f32[X, K'], cross-entropy of the labels.
      mask: bool[X, K'], supervised slots.
      known: bool[X, K'], of these, slots whose label the head has.
    """
    if self.slot_weights == "dpace":
      unsure = jnp.where(known, surprise, jnp.inf)
      weights = losses.dpace_weights(unsure, mask, self.dpace_alpha)
    elif self.slot_weights == "decay":
      weights = losses.decay_weights(mask.shape[-1], self.decay)
    else:
      weights = jnp.ones(mask.shape[-1])
    return jnp.where(known, weights, 0.0)


def slot_sums(
  objective: Objective,
  drafts: Drafts,
  columns: jax.Array,
  mask: jax.Array,
  teacher: jax.Array | None = None,
  plain_share: jax.Array | float = 0.0,
) -> SlotSums:
  """The loss and its company, over X blocks.

  Args:
    objective: names the loss.
    drafts: what the drafter says.
    columns: i32[X, K'], the label's column; -1 where a trimmed head lacks it:
      such a slot can never be right, carries no loss, and breaks a run.
    mask: bool[X, K'], supervised slots.
    teacher: f32[X, K', V'], the target's logits of the same columns. Of a
      trimmed head it knows the law among the columns that are left.
    plain_share: from Objective.plain_share.
  """
  known = mask & (columns >= 0)
  surprise = losses.cross_entropy(drafts.law, columns)
  weights = objective.weigh(surprise, mask, known)
  chance = None
  if teacher is not None:
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher), axis=-1)
    chance = drafts.chance(teacher)

  def cost(name: str) -> jax.Array:
    if name == "selector":
      return _choice_cost(drafts.choice, columns, objective.selector_misses)
    if name == "confidence":
      assert drafts.odds is not None and chance is not None
      return losses.calibration(drafts.odds, chance)
    corrected = _law_cost(name, drafts.law, columns, mask, teacher)
    if not objective.curriculum:
      return corrected
    plain = _law_cost(name, drafts.plain, columns, mask, teacher)
    return (1 - plain_share) * corrected + plain_share * plain

  terms = {name: (weights * cost(name)).sum() for name, _ in objective.terms}
  shares = dict(objective.terms)
  return SlotSums(
    loss=jnp.stack([shares[name] * terms[name] for name in terms]).sum(),
    weight=weights.sum(),
    terms=terms,
    **count(drafts, columns, mask, chance),
  )


def _law_cost(
  name: str,
  logits: jax.Array,
  columns: jax.Array,
  mask: jax.Array,
  teacher: jax.Array | None,
) -> jax.Array:
  """f32[X, K'] of one term that trains logits f32[X, K', V']."""
  if name == "ce":
    return losses.cross_entropy(logits, columns)
  assert teacher is not None, name  # see Objective.needs_teacher
  if name == "kl":
    return losses.kl(logits, teacher)
  alpha = losses.overlap(logits, teacher)
  if name == "tv":
    return 1 - alpha
  if name == "lk":
    return losses.lk_hybrid(losses.kl(logits, teacher), alpha)
  drafts = jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)
  length = losses.expected_length(alpha, mask)[..., None]
  return jnp.broadcast_to(1 - length / drafts, mask.shape)  # e2e


def _choice_cost(
  choice: Choice | None, columns: jax.Array, misses: str
) -> jax.Array:
  """f32[X, K'] of a selector's K-way choice."""
  assert choice is not None  # see Objective.check_drafter
  overwrites = misses == "overwrite"
  return losses.pick(
    choice.scores,
    choice.is_label(columns),
    choice.label_score if overwrites else None,
  )


def _parse(loss: str) -> tuple[tuple[str, float], ...]:
  """(name, coefficient) of each term of "0.1*ce + tv"."""
  terms: dict[str, float] = {}
  for text in loss.split("+"):
    match = _TERM.fullmatch(text.strip())
    if match is None:
      raise _no_loss(loss, f"cannot read {text.strip()!r}")
    share, name = match[1] or "1", match[2]
    if name not in TERMS:
      raise _no_loss(loss, f"{name!r} is unknown")
    if name in terms:
      raise _no_loss(loss, f"{name!r} is there twice")
    try:
      terms[name] = float(share)
    except ValueError as error:
      raise _no_loss(loss, f"{share!r} is no number") from error
    if not 0 < terms[name] < math.inf:
      raise _no_loss(loss, f"{share} of {name!r} is not above 0")
  if not any(name in LAW_TERMS for name in terms):
    raise _no_loss(
      loss, f"none of {', '.join(LAW_TERMS)} trains the slots' logits"
    )
  return tuple(terms.items())


def _no_loss(loss: str, why: str) -> ConfigError:
  return ConfigError(
    f"train.loss={loss!r} is impossible: {why}; write a sum of terms such as "
    f"'0.1*ce + 1.8*tv', of {', '.join(TERMS)}"
  )
