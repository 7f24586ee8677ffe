"""Accepted length of held-out answers, by walking them as decoding would.

Greedy decoding reproduces a greedy answer token by token, so knowing at every
anchor how many drafts would be right is enough to replay its rounds. The mean
over all anchors is not the same: decoding starts more rounds where drafts fail,
and spread anchors flatter (measured on a first CPU drafter: 2.50 spread, 2.26
walked, 2.29 decoded).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Walk:
  """Rounds of many answers.

  Attributes:
    tau: tokens per round over all rounds, bonus included.
    tau_per_answer: mean over answers of each answer's own tokens per round.
    acceptance: f[K - 1], share of rounds that accept draft 1, 2, ...
    rounds: how many.
  """

  tau: float
  tau_per_answer: float
  acceptance: np.ndarray
  rounds: int


def walk(right: np.ndarray, loss_mask: np.ndarray) -> Walk:
  """Replays the rounds of each answer.

  Args:
    right: bool[N, S, K - 1]; whether draft k of a block anchored there is the
      answer's own token.
    loss_mask: bool[N, S], the answers.
  """
  runs = np.cumprod(right, axis=-1).sum(axis=-1)
  accepted: list[int] = []
  ratios: list[float] = []
  emitted_total = 0
  for row_runs, row_mask in zip(runs, loss_mask, strict=True):
    answer = np.flatnonzero(row_mask)
    if len(answer) < 2:
      continue
    # The prefill emits the first token; rounds emit the rest.
    anchor, last = int(answer[0]), int(answer[-1])
    row = []
    while anchor < last:
      row.append(int(row_runs[anchor]))
      anchor += row[-1] + 1
    emitted = last - int(answer[0])
    emitted_total += emitted
    ratios.append(emitted / len(row))
    accepted += row
  rounds = max(len(accepted), 1)
  counts = np.bincount(accepted, minlength=right.shape[-1] + 1)
  at_least = counts[::-1].cumsum()[::-1][1:]
  return Walk(
    tau=emitted_total / rounds,
    tau_per_answer=float(np.mean(ratios)) if ratios else 0.0,
    acceptance=at_least / rounds,
    rounds=len(accepted),
  )
