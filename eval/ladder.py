"""The losslessness ladder: how exactly output is plain decoding's.

First rung: the same tokens as plain decoding; where a reply differs, the gap
between its two best tokens tells a tie from a mistake. Second rung: the target
reads every reply again in passes of the shape that verified it, round by round,
always fed what was emitted, and must choose every token of it. What decodes has
no part in that but the target's formulas: a fault of acceptance, of the cache
after a rejection, or of noise shows here at once. In bfloat16 the first rung
becomes the third: a share of identical replies, and gaps.
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.cache import KVCache
from dflash_jax.chat import Chat
from dflash_jax.compare import Comparison
from dflash_jax.generate import Batch, seed_of
from dflash_jax.model import Model
from dflash_jax.prediction import Prediction
from dflash_jax.sampling import Sampling, argmax, choice_times, weigh
from dflash_jax.session import Completion, bucket
from dflash_jax.target import Params, Target
from eval.protocol import TIE


@dataclasses.dataclass(frozen=True)
class Rescored:
  """A reply, read again by the target.

  Attributes:
    chosen: the target's token at each place of the reply.
    gaps: how far its best token was ahead of the next, in logits; noise
      included where it was drawn.
  """

  chosen: list[int]
  gaps: list[float]


def climb(
  model: Model,
  batches: Sequence[Batch],
  comparisons: Sequence[Comparison],
) -> dict[str, Any]:
  """Both rungs, as a record has them.

  Args:
    model: that decoded, with its drafter.
    batches: that it decoded, from plan_batches.
    comparisons: one per reply, by place in the result.

  Returns:
    "dtype", "guarantee"; "identical" of "replies"; "differences", each with
    the reply's place, the token where it first differs, its gap and whether
    that is a tie; "rescored_tokens", "agreed_tokens" and "disagreements", in
    passes of "rows" rows. Of a rule that promises only the law there is no
    token to expect, so it has no rescoring.
  """
  guarantee = comparisons[0].guarantee
  dtype = model.config.target.dtype
  found: dict[str, Any] = {
    "dtype": dtype,
    "guarantee": guarantee,
    "replies": len(comparisons),
    "identical": sum(each.is_identical for each in comparisons),
  }
  if guarantee != "tokens":
    return found
  replies = [each.speculative for each in comparisons]
  rescored = dict(rescore(model, batches, replies))
  differences = [
    _difference(place, find_first(each), rescored[place])
    for place, each in enumerate(comparisons)
    if not each.is_identical
  ]
  gaps = [each["gap"] for each in differences]
  disagreements = [
    _difference(place, token, rescored[place])
    for place, reply in enumerate(replies)
    for token, (said, chosen) in enumerate(
      zip(reply.tokens, rescored[place].chosen, strict=True)
    )
    if said != chosen
  ]
  tokens = sum(len(reply.tokens) for reply in replies)
  return found | {
    "differences": differences,
    "median_gap": statistics.median(gaps) if gaps else None,
    "rows": model.decoder().drafting.num_nodes + 1,
    "rescored_tokens": tokens,
    "agreed_tokens": tokens - len(disagreements),
    "disagreements": disagreements,
  }


def find_first(comparison: Comparison) -> int:
  """Where two replies first differ."""
  ours, theirs = comparison.speculative.tokens, comparison.plain.tokens
  pairs = enumerate(zip(ours, theirs, strict=False))
  shared = min(len(ours), len(theirs)) - 1
  return next((n for n, (a, b) in pairs if a != b), shared)


def _difference(place: int, token: int, found: Rescored) -> dict[str, Any]:
  gap = found.gaps[token]
  return {
    "place": place,
    "token": token,
    "gap": float(f"{gap:.6g}"),
    "tie": gap <= TIE,
  }


# --- Reading again ------------------------------------------------------------


def rescore(
  model: Model, batches: Sequence[Batch], replies: Sequence[Completion]
) -> Iterator[tuple[int, Rescored]]:
  """Has the target read replies again, in the shapes that decoded them.

  Args:
    model, batches: that decoded.
    replies: one per place.

  Yields:
    (place, Rescored), a turn of a batch at a time.
  """
  assert model.tokenizer is not None  # the batches were planned with it
  for batch in batches:
    reader = _Reader.open(model, batch)
    chats = [Chat(model.tokenizer, model.stop_ids) for _ in batch.prompts]
    for turn in range(max(len(prompt.turns) for prompt in batch.prompts)):
      rows = [
        row
        for row, prompt in enumerate(batch.prompts)
        if turn < len(prompt.turns)
      ]
      texts = {row: batch.prompts[row].turns[turn] for row in rows}
      mine = {row: replies[batch.places[row] + turn] for row in rows}
      found = reader.read(
        {row: chats[row].next_prompt(texts[row]) for row in rows}, mine
      )
      for row in rows:
        chats[row].add_turn(texts[row], mine[row].text, mine[row].tokens)
        yield batch.places[row] + turn, found[row]


@dataclasses.dataclass
class _Reader:
  """Rows of a batch, as far as they have been read.

  Attributes:
    model: whose target reads. sampling: its law.
    batch: B. rows: of a round's pass, the anchor's and its drafts'.
    seeds: u32[B]. cache: of the target alone.
  """

  model: Model
  sampling: Sampling
  batch: int
  rows: int
  seeds: jax.Array
  cache: KVCache

  @classmethod
  def open(cls, model: Model, batch: Batch) -> "_Reader":
    """Empty rows, with the room and the seeds that the batch had."""
    decoder = model.decoder()
    chunk = bucket(batch.capacity, model.config.decode.prefill_chunk)
    seeds = [seed_of(model, place) for place in batch.places]
    seeds += [0] * (batch.rows - len(seeds))
    return cls(
      model=model,
      sampling=decoder.sampling,
      batch=batch.rows,
      rows=decoder.drafting.num_nodes + 1,
      seeds=jnp.asarray(seeds, jnp.uint32),
      cache=model.target.init_cache(
        batch.rows, batch.capacity + decoder.slack(chunk), decoder.dtype
      ),
    )

  def read(
    self, prompts: dict[int, list[int]], replies: dict[int, Completion]
  ) -> dict[int, Rescored]:
    """One turn: the prompts of some rows, then their replies."""
    found = {row: Rescored([], []) for row in prompts}
    self._read_prompts(prompts, found)
    rounds = {row: split_rounds(reply.slots) for row, reply in replies.items()}
    for number in range(max(map(len, rounds.values()))):
      tokens = np.zeros((self.batch, self.rows), np.int32)
      count = np.zeros((self.batch,), np.int32)
      for row, spans in rounds.items():
        if number < len(spans):
          first, last = spans[number]
          # The token before the first is the anchor.
          tokens[row, : last - first] = replies[row].tokens[
            first - 1 : last - 1
          ]
          count[row] = last - first
      chosen, gaps = self._pass(tokens, count, only_last=False)
      for row in rounds:
        found[row].chosen.extend(chosen[row, : count[row]].tolist())
        found[row].gaps.extend(gaps[row, : count[row]].tolist())
    return found

  def _read_prompts(
    self, prompts: dict[int, list[int]], found: dict[int, Rescored]
  ) -> None:
    longest = max(map(len, prompts.values()))
    size = bucket(longest, self.model.config.decode.prefill_chunk)
    for first in range(0, longest, size):
      tokens = np.zeros((self.batch, size), np.int32)
      count = np.zeros((self.batch,), np.int32)
      for row, prompt in prompts.items():
        piece = prompt[first : first + size]
        tokens[row, : len(piece)], count[row] = piece, len(piece)
      chosen, gaps = self._pass(tokens, count, only_last=True)
      for row, prompt in prompts.items():
        if first < len(prompt) <= first + size:
          found[row].chosen.append(int(chosen[row, 0]))
          found[row].gaps.append(float(gaps[row, 0]))

  def _pass(
    self, tokens: np.ndarray, count: np.ndarray, *, only_last: bool
  ) -> tuple[np.ndarray, np.ndarray]:
    chosen, gaps, self.cache = _score(
      self.model.target,
      self.sampling,
      only_last,
      self.model.params.target,
      self.cache,
      tokens,
      count,
      self.seeds,
    )
    return jax.device_get((chosen, gaps))


def split_rounds(slots: Sequence[int]) -> list[tuple[int, int]]:
  """[first, last) of each round of a reply, whose first token is prefill's.

  A round ends with a token of the target's own, slot 0, or with the reply.
  """
  spans, first = [], 1
  for place in range(1, len(slots)):
    if slots[place] == 0 or place == len(slots) - 1:
      spans.append((first, place + 1))
      first = place + 1
  return spans


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _score(
  target: Target,
  sampling: Sampling,
  only_last: bool,
  params: Params,
  cache: KVCache,
  tokens: jax.Array,
  count: jax.Array,
  seeds: jax.Array,
) -> tuple[jax.Array, jax.Array, KVCache]:
  """Reads tokens i32[B, T], of which the first count i32[B] are kept.

  Returns:
    The target's choice after each row i32[B, T] and its gap f32[B, T], or
    after the last row that is kept alone, T = 1; the cache.
  """
  hidden, _, rows = target.forward(params, tokens, cache)
  positions = cache.positions(tokens.shape[1]) + 1
  if only_last:
    last = jnp.maximum(count - 1, 0)[:, None]
    hidden = jnp.take_along_axis(hidden, last[..., None], axis=1)
    positions = jnp.take_along_axis(positions, last, axis=1)
  prediction = target.predict(params, hidden)
  chosen = prediction.choose(sampling, seeds, positions)
  gaps = _gaps(prediction, sampling, seeds, positions)
  return chosen, gaps, cache.extend(rows, count)


def _gaps(
  prediction: Prediction,
  sampling: Sampling,
  seeds: jax.Array,
  positions: jax.Array,
) -> jax.Array:
  """f32[B, T]: the best token's lead over the next, in logits."""
  scores = prediction.logits()
  if not sampling.is_greedy:
    times = choice_times(scores.shape[-1], seeds, positions, None)
    weights = weigh(scores, sampling)
    scores = sampling.temperature * (jnp.log(weights) - jnp.log(times))
  winner = argmax(scores)[..., None]
  others = jnp.where(jnp.arange(scores.shape[-1]) == winner, -jnp.inf, scores)
  return jnp.take_along_axis(scores, winner, -1)[..., 0] - others.max(axis=-1)
