"""How many drafts the target accepts."""

import collections
import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from dflash_jax.config import EvalConfig
from dflash_jax.generate import generate
from dflash_jax.model import Model
from dflash_jax.prompts import Prompt
from dflash_jax.session import Completion, acceptance_per_position


@dataclasses.dataclass(frozen=True)
class Acceptance:
  """Acceptance over a set of replies, P drafts per round.

  Lengths count emitted tokens, the bonus included, a reply's first token (it
  comes out of prefill) not. Positions and histogram count what the target
  accepted, before budget or stop token cut a reply's last round.

  Attributes:
    requests: replies; a prompt of several turns has one per turn.
    rounds: of all replies.
    tau_per_request: mean over replies of tokens per round; replies without a
      round are left out.
    tau_per_round: all tokens / all rounds; long replies weigh more.
    acceptance_per_position: for i = 1..P, rounds with at least i accepted
      drafts / rounds.
    conditional_acceptance: for i = 1..P, rounds with at least i accepted
      drafts / rounds with at least i - 1; 0 where there were none.
    histogram: rounds by number of drafts accepted, 0..P.
  """

  requests: int
  rounds: int
  tau_per_request: float
  tau_per_round: float
  acceptance_per_position: list[float]
  conditional_acceptance: list[float]
  histogram: list[int]


def evaluate(
  model: Model, prompts: Sequence[Prompt], settings: EvalConfig
) -> Acceptance:
  """Decodes the prompts and measures acceptance."""
  completions = generate(
    model,
    prompts[: settings.limit or None],
    max_new_tokens=settings.max_new_tokens,
    batch_size=settings.batch_size,
  )
  return summarize(completions)


def summarize(completions: Sequence[Completion]) -> Acceptance:
  """Acceptance of replies that were decoded with one drafter."""
  histogram = np.sum([c.accepted for c in completions], axis=0)
  rounds = sum(c.rounds for c in completions)
  taus = [c.tau for c in completions if c.rounds]
  emitted = sum(len(c.tokens) - 1 for c in completions)
  shares = acceptance_per_position(histogram.tolist())
  before = [1.0, *shares[:-1]]
  return Acceptance(
    requests=len(completions),
    rounds=rounds,
    tau_per_request=statistics.fmean(taus) if taus else 0.0,
    tau_per_round=emitted / rounds if rounds else 0.0,
    acceptance_per_position=shares,
    conditional_acceptance=[
      share / base if base else 0.0
      for share, base in zip(shares, before, strict=False)
    ],
    histogram=histogram.tolist(),
  )


def summarize_by(
  labels: Sequence[str], completions: Sequence[Completion]
) -> dict[str, dict[str, Any]]:
  """Acceptance of the replies that share a label, as dicts.

  Args:
    labels: one per reply, such as the category of its prompt.
    completions: decoded with one drafter.
  """
  groups = collections.defaultdict(list)
  for label, completion in zip(labels, completions, strict=True):
    groups[label].append(completion)
  return {
    label: dataclasses.asdict(summarize(group))
    for label, group in groups.items()
  }
