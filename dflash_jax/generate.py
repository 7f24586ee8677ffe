"""Prompts in, text out: any number of prompts, in batches."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from dflash_jax.chat import Chat
from dflash_jax.config import ConfigError
from dflash_jax.model import Model
from dflash_jax.prompts import Prompt
from dflash_jax.session import (
  Completion,
  OnTokens,
  Session,
  bucket,
  check_fits,
)


@dataclasses.dataclass(frozen=True)
class Batch:
  """Prompts decoded together, and the shapes that takes.

  Two batches of equal shapes share every compilation.

  Attributes:
    prompts: at most `rows` of them.
    places: per prompt, where its first turn stands in the result.
    rows: B.
    pieces: per turn, the padded length of prompt pieces.
    capacity: of a Session.
    max_new_tokens: of each reply.
  """

  prompts: list[Prompt]
  places: list[int]
  rows: int
  pieces: tuple[int, ...]
  capacity: int
  max_new_tokens: int

  @property
  def shapes(self) -> tuple[Any, ...]:
    """All that compilations depend on."""
    return self.rows, self.pieces, self.capacity, self.max_new_tokens


@overload
def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too
  model: Model,
  prompts: str,
  *,
  max_new_tokens: int | None = None,
  batch_size: int | None = None,
  on_tokens: OnTokens | None = None,
) -> Completion: ...


@overload
def generate(
  model: Model,
  prompts: Prompt | Sequence[str | Prompt],
  *,
  max_new_tokens: int | None = None,
  batch_size: int | None = None,
  on_tokens: OnTokens | None = None,
) -> list[Completion]: ...


def generate(
  model: Model,
  prompts: str | Prompt | Sequence[str | Prompt],
  *,
  max_new_tokens: int | None = None,
  batch_size: int | None = None,
  on_tokens: OnTokens | None = None,
) -> Completion | list[Completion]:
  """Answers prompts in the target's chat template, as config.decode says.

  Args:
    model: from `load`.
    prompts: what the user says; a Prompt of several turns is a conversation,
      answered turn after turn without reading anything twice (see Chat).
    max_new_tokens: most tokens of a reply; None takes the config's.
    batch_size: prompts decoded together; None takes the config's.
    on_tokens: called after each dispatch with (place in the result, new token
      ids, their block slots).

  Returns:
    The Completion of a str; else a list with one Completion per turn, prompts
    and their turns in order.

  Raises:
    ConfigError: a prompt and its budget exceed decode.max_length, or the model
      has no tokenizer.
    TokenizerError: the tokenizer has no chat template.
  """
  several = [prompts] if isinstance(prompts, str | Prompt) else prompts
  batches = plan_batches(
    model, several, max_new_tokens=max_new_tokens, batch_size=batch_size
  )
  results: dict[int, Completion] = {}
  for batch in batches:
    results.update(answer(model, batch, on_tokens=on_tokens))
  if isinstance(prompts, str):
    return results[0]
  return [results[place] for place in range(len(results))]


def plan_batches(
  model: Model,
  prompts: Sequence[str | Prompt],
  *,
  max_new_tokens: int | None = None,
  batch_size: int | None = None,
) -> list[Batch]:
  """Groups prompts of similar length; arguments as in `generate`."""
  decode = model.config.decode
  budget = decode.max_new_tokens if max_new_tokens is None else max_new_tokens
  size = decode.batch_size if batch_size is None else batch_size
  for name, value in (("max_new_tokens", budget), ("batch_size", size)):
    if value < 1:
      raise ConfigError(f"{name}={value} is impossible; use at least 1")
  chat = _new_chat(model)
  parsed = [Prompt((p,)) if isinstance(p, str) else p for p in prompts]
  lengths = [chat.lengths(prompt.turns) for prompt in parsed]
  for counts in lengths:
    check_fits(sum(counts), len(counts) * budget, decode.max_length)
  places = np.cumsum([0, *map(len, lengths)]).tolist()
  order = list(range(len(parsed)))
  if size > 1:
    order.sort(key=lambda i: (len(lengths[i]), sum(lengths[i])))
  rows = min(size, len(parsed))
  batches = []
  for first in range(0, len(order), max(rows, 1)):
    members = order[first : first + rows]
    pieces, capacity = _shapes(
      [lengths[i] for i in members], budget, decode.prefill_chunk
    )
    batches.append(
      Batch(
        prompts=[parsed[i] for i in members],
        places=[places[i] for i in members],
        rows=rows,
        pieces=pieces,
        capacity=capacity,
        max_new_tokens=budget,
      )
    )
  return batches


def _shapes(
  lengths: list[list[int]], budget: int, chunk: int
) -> tuple[tuple[int, ...], int]:
  """Piece lengths per turn, and the capacity, of rows read in these lengths."""
  turns = max(map(len, lengths))
  longest = [
    max(counts[turn] for counts in lengths if turn < len(counts))
    for turn in range(turns)
  ]
  total = max(map(sum, lengths))
  size = bucket(total, chunk)
  capacity = -(-total // size) * size + turns * budget
  return tuple(bucket(length, chunk) for length in longest), capacity


def align(batches: Sequence[Batch]) -> list[Batch]:
  """The same batches with the room of the largest: rounds compile once."""
  capacity = max((batch.capacity for batch in batches), default=0)
  return [dataclasses.replace(batch, capacity=capacity) for batch in batches]


def warm_up(model: Model, batches: Iterable[Batch]) -> None:
  """Compiles everything that `answer` runs for these batches."""
  for batch in {batch.shapes: batch for batch in batches}.values():
    few = min(2, batch.max_new_tokens)  # one from prefill, one from a round
    for _ in answer(model, batch, max_new_tokens=few):
      pass


def answer(
  model: Model,
  batch: Batch,
  *,
  max_new_tokens: int | None = None,
  on_tokens: OnTokens | None = None,
) -> Iterator[tuple[int, Completion]]:
  """Decodes one batch, turn after turn.

  Args:
    model: any with the tokenizer that the batch was planned with.
    batch: from `plan_batches`.
    max_new_tokens: a smaller budget, which runs the same compiled code.
    on_tokens: as in `generate`.

  Yields:
    (place in the result, Completion), a turn at a time.
  """
  session = Session(
    model=model,
    decoder=model.decoder(),
    batch=batch.rows,
    capacity=batch.capacity,
    max_new_tokens=batch.max_new_tokens,
  )
  budget = max_new_tokens or batch.max_new_tokens
  chats = [_new_chat(model) for _ in batch.prompts]
  for turn in range(max(len(prompt.turns) for prompt in batch.prompts)):
    asked = [p.turns[turn : turn + 1] for p in batch.prompts]
    completions = session.reply(
      [
        chat.next_prompt(text[0]) if text else []
        for chat, text in zip(chats, asked, strict=True)
      ],
      [budget if text else 0 for text in asked],
      seeds=[seed_of(model, place) for place in batch.places],
      on_tokens=_to_places(on_tokens, batch.places, turn),
    )
    rows = zip(chats, asked, completions, batch.places, strict=True)
    for chat, text, completion, place in rows:
      if text:
        chat.add_turn(text[0], completion.text, completion.tokens)
        yield place + turn, completion


def seed_of(model: Model, place: int) -> int:
  """The noise seed of a conversation: config.decode.seed and its place decide.

  Args:
    model: its config's seed may be any non-negative integer.
    place: of the conversation's first turn in the result.
  """
  seed = model.config.decode.seed
  if seed < 0:
    raise ConfigError(f"seed={seed} is impossible; use 0 or more")
  words = np.random.SeedSequence([seed, place])
  return int(words.generate_state(1)[0])


def _to_places(
  on_tokens: OnTokens | None, places: list[int], turn: int
) -> OnTokens | None:
  """The callback of a Session that calls `on_tokens` with places."""
  if on_tokens is None:
    return None
  return lambda row, ids, slots: on_tokens(places[row] + turn, ids, slots)


def _new_chat(model: Model) -> Chat:
  if model.tokenizer is None:
    raise ConfigError(
      "this model has no tokenizer; give token ids to Session.reply instead"
    )
  return Chat(model.tokenizer, model.stop_ids)
