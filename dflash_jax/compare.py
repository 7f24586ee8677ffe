"""Plain against speculative decoding of the same prompts, in one process."""

import dataclasses
import statistics
from collections.abc import Iterator, Sequence

from dflash_jax.config import ConfigError
from dflash_jax.generate import Batch, answer, warm_up
from dflash_jax.model import Model
from dflash_jax.session import Completion, OnTokens


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The same reply, decoded both ways.

  Attributes:
    speculative, plain: the replies.
    guarantee: key of verify.GUARANTEES, what they should share.
  """

  speculative: Completion
  plain: Completion
  guarantee: str = "tokens"

  @property
  def is_identical(self) -> bool:
    """Whether both are the same tokens."""
    return self.speculative.tokens == self.plain.tokens

  @property
  def speedup(self) -> float:
    """Ratio of times per token, prefill excluded; 0 for a reply of one."""
    ours = self.speculative.tpot_s
    return self.plain.tpot_s / ours if ours else 0.0


def compare(
  model: Model,
  batches: Sequence[Batch],
  *,
  repeats: int = 1,
  on_tokens: OnTokens | None = None,
) -> Iterator[tuple[int, Comparison]]:
  """Decodes each batch both ways, one right after the other.

  Both are compiled before the clock starts, and a machine that slows down for
  a while slows both.

  Args:
    model: with its drafter.
    batches: from plan_batches.
    repeats: timed passes over each batch; times become medians.
    on_tokens: of the first speculative pass, as in `generate`.

  Yields:
    (place in the result, Comparison), batch after batch.

  Raises:
    ConfigError: the model has no drafter.
  """
  if model.drafter.max_drafts == 0:
    raise ConfigError(
      "there is no drafter to compare plain decoding with; name its directory "
      "in --drafter or drafter.path"
    )
  plain = model.without_drafter()
  guarantee = model.decoder().guarantee
  warm_up(model, batches)
  warm_up(plain, batches)
  for batch in batches:
    ours, theirs = take_turns(
      (model, plain), batch, repeats=repeats, on_tokens=on_tokens
    )
    for place in ours:
      yield place, Comparison(ours[place], theirs[place], guarantee)


def take_turns(
  models: Sequence[Model],
  batch: Batch,
  *,
  repeats: int = 1,
  first: int = 0,
  on_tokens: OnTokens | None = None,
) -> list[dict[int, Completion]]:
  """Decodes a batch by several models, one right after the other.

  Args:
    models: all of them compiled, see `warm_up`.
    batch: from plan_batches.
    repeats: passes over all of them; times become medians.
    first: whose turn comes first; the others follow in order, and around.
    on_tokens: of the first model's first pass, as in `generate`.

  Returns:
    Of each model, its Completions by place in the result.
  """
  order = [*range(len(models))]
  order = order[first:] + order[:first]
  passes: list[list[dict[int, Completion]]] = [[] for _ in models]
  for number in range(repeats):
    for index in order:
      callback = on_tokens if index == 0 and number == 0 else None
      found = dict(answer(models[index], batch, on_tokens=callback))
      passes[index].append(found)
  return [
    {place: _median([found[place] for found in mine]) for place in mine[0]}
    for mine in passes
  ]


def _median(completions: Sequence[Completion]) -> Completion:
  """One reply, decoded several times, with the median of each time."""
  times = {
    name: statistics.median(getattr(c, name) for c in completions)
    for name in ("ttft_s", "tpot_s", "tokens_per_s")
  }
  return dataclasses.replace(completions[0], **times)
