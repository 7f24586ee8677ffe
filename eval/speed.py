"""How fast speculative decoding is, and whether it is lossless."""

import dataclasses
import statistics
from collections.abc import Sequence

import tqdm

from dflash_jax.compare import Comparison, compare
from dflash_jax.config import EvalConfig
from dflash_jax.generate import Batch, plan_batches
from dflash_jax.model import Model
from dflash_jax.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class Speed:
  """Plain against speculative decoding of the same prompts.

  Rates are tokens after the first per second of one request, so prefill and
  compilation are outside; both ways run in one process, batch by batch.

  Attributes:
    plain_tokens_per_s, speculative_tokens_per_s: medians over replies.
    speedup: median over replies of the ratio of times per token.
    plain_ttft_s, speculative_ttft_s: medians, drafter prefill included.
    identical_fraction: replies whose tokens are the same both ways.
  """

  plain_tokens_per_s: float
  speculative_tokens_per_s: float
  speedup: float
  plain_ttft_s: float
  speculative_ttft_s: float
  identical_fraction: float


def evaluate(
  model: Model, prompts: Sequence[Prompt], settings: EvalConfig
) -> Speed:
  """Decodes the prompts both ways and compares."""
  return summarize(decode_both_ways(model, prompts, settings))


def decode_both_ways(
  model: Model, prompts: Sequence[Prompt], settings: EvalConfig
) -> list[Comparison]:
  """One Comparison per turn, prompts in order."""
  batches = plan(model, prompts, settings)
  turns = sum(len(p.turns) for batch in batches for p in batch.prompts)
  found = compare(model, batches, repeats=settings.repeats)
  results = dict(tqdm.tqdm(found, total=turns, unit="reply", disable=None))
  return [results[place] for place in range(turns)]


def plan(
  model: Model, prompts: Sequence[Prompt], settings: EvalConfig
) -> list[Batch]:
  """The batches that `decode_both_ways` decodes."""
  return plan_batches(
    model,
    prompts[: settings.limit or None],
    max_new_tokens=settings.max_new_tokens,
    batch_size=settings.batch_size,
  )


def summarize(comparisons: Sequence[Comparison]) -> Speed:
  """Medians over replies; those of one token have no rate and only identity."""
  timed = [c for c in comparisons if c.speedup > 0]

  def median(values: list[float]) -> float:
    return statistics.median(values) if values else 0.0

  return Speed(
    plain_tokens_per_s=median([c.plain.tokens_per_s for c in timed]),
    speculative_tokens_per_s=median(
      [c.speculative.tokens_per_s for c in timed]
    ),
    speedup=median([c.speedup for c in timed]),
    plain_ttft_s=median([c.plain.ttft_s for c in comparisons]),
    speculative_ttft_s=median([c.speculative.ttft_s for c in comparisons]),
    identical_fraction=statistics.fmean(c.is_identical for c in comparisons),
  )
