"""A measurement reply by reply: what its numbers and intervals are made of."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dflash_jax.compare import Comparison
from dflash_jax.prompts import Prompt
from eval import bootstrap

Weights = np.ndarray  # i[draws, N], of bootstrap.draw


@dataclasses.dataclass(frozen=True)
class Replies:
  """N replies, decoded with a drafter and without.

  Attributes:
    prompt: i[N], number of its prompt, from 0. turn: i[N], of the prompt.
    tokens: i[N], of the reply, stop token included.
    rounds: i[N], target passes after prefill.
    accepted: i[N, D + 1], rounds by number of drafts accepted.
    seconds, plain_seconds: f[N], per token after the first; 0 if there is none.
    identical: bool[N], whether its tokens are plain decoding's.
  """

  prompt: np.ndarray
  turn: np.ndarray
  tokens: np.ndarray
  rounds: np.ndarray
  accepted: np.ndarray
  seconds: np.ndarray
  plain_seconds: np.ndarray
  identical: np.ndarray

  @classmethod
  def of(
    cls, prompts: Sequence[Prompt], comparisons: Sequence[Comparison]
  ) -> "Replies":
    """One per turn of each prompt, in order."""
    turns = [
      (number, turn)
      for number, prompt in enumerate(prompts)
      for turn in range(len(prompt.turns))
    ]
    ours = [each.speculative for each in comparisons]
    number, turn = np.array(turns).T
    if len(turns) != len(ours):
      raise ValueError(f"{len(turns)} turns have {len(ours)} replies")
    return cls(
      prompt=number,
      turn=turn,
      tokens=np.array([len(reply.tokens) for reply in ours]),
      rounds=np.array([reply.rounds for reply in ours]),
      accepted=np.array([reply.accepted for reply in ours]),
      seconds=np.array([reply.tpot_s for reply in ours]),
      plain_seconds=np.array([each.plain.tpot_s for each in comparisons]),
      identical=np.array([each.is_identical for each in comparisons]),
    )

  @classmethod
  def from_json(cls, columns: dict[str, Any]) -> "Replies":
    """What `to_json` made; KeyError, TypeError or ValueError if it did not."""
    fields = [field.name for field in dataclasses.fields(cls)]
    found = {name: np.array(columns[name]) for name in fields}
    if any(values.dtype == object for values in found.values()):
      raise ValueError("replies are no numbers")
    if len({len(values) for values in found.values()}) != 1:
      raise ValueError("replies have columns of unequal length")
    if found["accepted"].ndim != 2 or not len(found["prompt"]):
      raise ValueError("replies have no rounds")
    return cls(**found)

  def to_json(self) -> dict[str, Any]:
    """Columns; times to six digits."""
    columns = {
      field.name: getattr(self, field.name).tolist()
      for field in dataclasses.fields(self)
    }
    for name in ("seconds", "plain_seconds"):
      columns[name] = [float(f"{value:.6g}") for value in columns[name]]
    return columns

  def take(self, places: np.ndarray) -> "Replies":
    """Those at these places, in their order."""
    return Replies(
      **{
        field.name: getattr(self, field.name)[places]
        for field in dataclasses.fields(self)
      }
    )

  @property
  def prompts(self) -> int:
    """How many there are."""
    return len(np.unique(self.prompt))

  @property
  def reached(self) -> np.ndarray:
    """i[N, D + 1]: rounds with at least 0..D accepted drafts."""
    return self.accepted[:, ::-1].cumsum(axis=1)[:, ::-1]


# --- Numbers ------------------------------------------------------------------


def tau_per_request(replies: Replies, weights: Weights) -> np.ndarray:
  """f[draws]: mean over replies that took a round."""
  has_rounds = replies.rounds > 0
  taus = (replies.tokens - 1) / np.maximum(replies.rounds, 1)
  return bootstrap.ratio(taus * has_rounds, has_rounds * 1, weights)


def tau_per_round(replies: Replies, weights: Weights) -> np.ndarray:
  """f[draws]: all tokens after the first / all rounds."""
  return bootstrap.ratio(replies.tokens - 1, replies.rounds, weights)


def acceptance_per_position(replies: Replies, weights: Weights) -> np.ndarray:
  """f[draws, D]: rounds that accepted at least i / rounds."""
  reached = replies.reached
  return bootstrap.ratio(reached[:, 1:], reached[:, :1], weights)


def conditional_acceptance(replies: Replies, weights: Weights) -> np.ndarray:
  """f[draws, D]: rounds that accepted at least i / at least i - 1."""
  reached = replies.reached
  return bootstrap.ratio(reached[:, 1:], reached[:, :-1], weights)


def speculative_tokens_per_s(replies: Replies, weights: Weights) -> np.ndarray:
  """f[draws]: median over replies of more than one token."""
  timed = _timed(replies)
  return bootstrap.median(1 / replies.seconds[timed], weights[:, timed])


def plain_tokens_per_s(replies: Replies, weights: Weights) -> np.ndarray:
  """f[draws]: the same of plain decoding."""
  timed = _timed(replies)
  return bootstrap.median(1 / replies.plain_seconds[timed], weights[:, timed])


def speedup(replies: Replies, weights: Weights) -> np.ndarray:
  """f[draws]: median over replies of the ratio of times per token."""
  timed = _timed(replies)
  ratios = replies.plain_seconds[timed] / replies.seconds[timed]
  return bootstrap.median(ratios, weights[:, timed])


def _timed(replies: Replies) -> np.ndarray:
  return (replies.seconds > 0) & (replies.plain_seconds > 0)


# By their keys in a record.
NUMBERS: dict[str, Callable[[Replies, Weights], np.ndarray]] = {
  number.__name__: number
  for number in (
    tau_per_request,
    tau_per_round,
    acceptance_per_position,
    conditional_acceptance,
    plain_tokens_per_s,
    speculative_tokens_per_s,
    speedup,
  )
}


def find_intervals(replies: Replies) -> dict[str, Any]:
  """[low, high] of each of NUMBERS; of those by position, a list of them.

  None where there is nothing to say: of a single prompt, or where no reply
  came so far.
  """
  weights = bootstrap.draw(replies.prompt)
  found: dict[str, Any] = {}
  for name, number in NUMBERS.items():
    low, high = bootstrap.bounds(number(replies, weights))
    pairs = [
      [round(float(a), 6), round(float(b), 6)]
      if replies.prompts > 1 and not np.isnan(a)
      else None
      for a, b in zip(np.atleast_1d(low), np.atleast_1d(high), strict=True)
    ]
    found[name] = pairs if low.ndim else pairs[0]
  return found
