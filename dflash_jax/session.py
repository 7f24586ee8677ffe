"""Rows of one batch: token ids in, token ids out, turn after turn."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.config import ConfigError
from dflash_jax.costs import measure_costs
from dflash_jax.decode import Decoder
from dflash_jax.decode_state import DecodeState, ModelParams
from dflash_jax.model import Model
from dflash_jax.width import Costs

MIN_CHUNK = 16  # tokens; shorter prompts share one compilation

# Called after each dispatch with (index, new token ids, their block slots);
# the index is the row in a Session, and the place in the result in `generate`.
OnTokens = Callable[[int, list[int], list[int]], None]


@dataclasses.dataclass(frozen=True)
class Completion:
  """A reply and how it came about.

  Attributes:
    text: decoded reply, without the stop token.
    tokens: its ids, stop token included.
    slots: block slot each token was drafted in; 0 is the target's own.
    prompt_tokens: tokens read before it: of a later turn, those since the
      turn before.
    rounds: target passes after prefill.
    tau: tokens emitted per round, bonus included, the prefill's token not.
    accepted: rounds by number of drafts accepted, 0..D; a reply's last round
      counts whole, though budget or stop token cut what it emits.
    width: drafted nodes verified per round, mean.
    ttft_s: time to first token, target and drafter prefill included.
    tpot_s: seconds per token after the first, until the host saw this row end.
    tokens_per_s: tokens after the first, per second; rows of a batch share
      the device, and each has this rate.
  """

  text: str
  tokens: list[int]
  slots: list[int]
  prompt_tokens: int
  rounds: int
  tau: float
  accepted: list[int]
  width: float
  ttft_s: float
  tpot_s: float
  tokens_per_s: float


def bucket(length: int, chunk: int) -> int:
  """Padded length of a prompt piece: a power of two, at most `chunk`."""
  size = MIN_CHUNK
  while size < min(length, chunk):
    size *= 2
  return min(size, max(chunk, MIN_CHUNK))


@dataclasses.dataclass
class Session:
  """Rows of one batch and their caches, kept from turn to turn.

  Attributes:
    model: what decodes.
    decoder: how.
    batch: B, rows.
    capacity: longest row in tokens, replies included.
    max_new_tokens: longest reply a turn may ask for.
    state: on the device.
    lengths: i64[B], tokens in the caches; the anchor is not.
    params: the model's, with measured costs where the width policy asks.
  """

  model: Model
  decoder: Decoder
  batch: int
  capacity: int
  max_new_tokens: int
  state: DecodeState = dataclasses.field(init=False)
  lengths: np.ndarray = dataclasses.field(init=False)
  params: ModelParams = dataclasses.field(init=False)

  def __post_init__(self):
    self.params = self.model.params
    if self.decoder.policy.needs_costs:
      self.params = dataclasses.replace(self.params, costs=self._costs())
    self.reset()

  def reset(self) -> None:
    """Forgets everything read; not what drafts were worth."""
    self.lengths = np.zeros((self.batch,), np.int64)
    state = self._new_state()
    belief = self.model.beliefs.get(self.decoder, state.width)
    self.state = dataclasses.replace(state, width=belief)

  def _new_state(self) -> DecodeState:
    slack = self.decoder.slack(self._chunk(self.capacity))
    return self.decoder.init_state(
      self.batch, self.capacity + slack, self.max_new_tokens
    )

  def _costs(self) -> Costs:
    """Costs of this decoder's rounds, measured once per model and batch."""
    tables = self.model.cost_tables
    key = (self.decoder, self.batch)
    if key not in tables:
      tables[key] = measure_costs(self.decoder, self.params, self._new_state)
    return tables[key]

  def reply(
    self,
    prompts: Sequence[Sequence[int]],
    budgets: Sequence[int],
    *,
    seeds: Sequence[int] | None = None,
    on_tokens: OnTokens | None = None,
  ) -> list[Completion]:
    """Reads one prompt per row, then decodes until every row is done.

    Args:
      prompts: token ids that follow what the row already holds; at most B.
        The last token of the row's previous reply (`pending`) has not been
        read: a prompt that continues it begins with it.
      budgets: most tokens of each reply; 0 with an empty prompt skips a row.
      seeds: noise stream of each row; only sampling reads them.
      on_tokens: streaming callback, after every dispatch.
    """
    rows = len(prompts)
    padding = self.batch - rows
    prompts = [list(prompt) for prompt in prompts] + [[]] * padding
    budgets = [*budgets] + [0] * padding
    seeds = [*(range(rows) if seeds is None else seeds)] + [0] * padding
    self._check(prompts, budgets)
    start = time.perf_counter()
    self.state = self.decoder.begin(
      self.state,
      jnp.asarray(budgets, jnp.int32),
      jnp.asarray(seeds, jnp.uint32),
    )
    self._prefill(prompts)
    jax.block_until_ready(self.state.anchor)
    first = time.perf_counter()
    ends = self._run_to_end(rows, on_tokens)
    # A copy on the host, for the state's own buffers are given away.
    self.model.beliefs[self.decoder] = jax.device_get(self.state.width)
    return self._completions(prompts[:rows], first - start, ends - first)

  def pending(self, row: int) -> int:
    """The row's anchor: emitted, but not yet in the caches."""
    return int(self.state.anchor[row])

  def _chunk(self, length: int) -> int:
    return bucket(length, self.model.config.decode.prefill_chunk)

  def _check(self, prompts: list[list[int]], budgets: list[int]) -> None:
    for row, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
      if budget and not prompt:
        raise ConfigError(f"prompt {row} is empty; it needs at least one token")
      if budget > self.max_new_tokens:
        raise ConfigError(
          f"max_new_tokens={budget} exceeds the session's {self.max_new_tokens}"
        )
      check_fits(int(self.lengths[row]) + len(prompt), budget, self.capacity)

  def _prefill(self, prompts: list[list[int]]) -> None:
    """Feeds the prompts in pieces of one padded length."""
    lengths = np.array([len(prompt) for prompt in prompts])
    size = self._chunk(int(lengths.max()))
    for first in range(0, int(lengths.max()), size):
      tokens = np.zeros((self.batch, size), np.int32)
      for row, prompt in enumerate(prompts):
        piece = prompt[first : first + size]
        tokens[row, : len(piece)] = piece
      count = np.clip(lengths - first, 0, size)
      is_last = (lengths > first) & (lengths <= first + size)
      self.state = self.decoder.prefill(
        self.params, self.state, tokens, count, is_last
      )

  def _run_to_end(self, rows: int, on_tokens: OnTokens | None) -> np.ndarray:
    """Dispatches rounds until all is done; f64[rows], when each row ended."""
    sent = np.zeros((rows,), np.int64)
    ends = np.zeros((rows,))
    ended = np.zeros((rows,), bool)
    while True:
      state = self.state
      done, counts, drafts = jax.device_get(
        (state.done, state.count, state.drafts)
      )
      now = time.perf_counter()
      ends[done[:rows] & ~ended] = now
      ended |= done[:rows]
      if on_tokens:
        self._stream(sent, counts[:rows], on_tokens)
        sent = counts[:rows]
      if done.all():
        return ends
      run = self.decoder.run_rounds if drafts else self.decoder.run_plain
      self.state = run(self.params, self.state)

  def _stream(
    self, sent: np.ndarray, counts: np.ndarray, on_tokens: OnTokens
  ) -> None:
    """Hands out the tokens of each row from sent i64[rows] to counts."""
    tokens, slots = jax.device_get((self.state.tokens, self.state.slots))
    for row, (first, last) in enumerate(zip(sent, counts, strict=True)):
      if last > first:
        new = slice(first, last)
        on_tokens(row, tokens[row, new].tolist(), slots[row, new].tolist())

  def _completions(
    self, prompts: list[list[int]], ttft: float, seconds: np.ndarray
  ) -> list[Completion]:
    """What each row became; seconds f64[rows] run from first token to last."""
    state = self.state
    tokens, slots, counts, rounds, accepted, verified, lengths = jax.device_get(
      (
        state.tokens,
        state.slots,
        state.count,
        state.rounds,
        state.accepted,
        state.verified,
        state.cache.length,
      )
    )
    self.lengths = lengths.astype(np.int64)
    tokenizer = self.model.tokenizer
    completions = []
    for row, prompt in enumerate(prompts):
      count, elapsed = int(counts[row]), float(seconds[row])
      ids = tokens[row, :count].tolist()
      later = max(count - 1, 0)  # the first token comes out of prefill
      completions.append(
        Completion(
          text=tokenizer.decode(ids) if tokenizer else "",
          tokens=ids,
          slots=slots[row, :count].tolist(),
          prompt_tokens=len(prompt),
          rounds=int(rounds[row]),
          tau=later / int(rounds[row]) if rounds[row] else 0.0,
          accepted=accepted[row].tolist(),
          width=int(verified[row]) / max(int(rounds[row]), 1),
          ttft_s=ttft,
          tpot_s=elapsed / later if later else 0.0,
          tokens_per_s=later / elapsed if later else 0.0,
        )
      )
    return completions


def check_fits(prompt_tokens: int, budget: int, capacity: int) -> None:
  """Raises ConfigError, naming the numbers, if a row cannot hold its reply."""
  if prompt_tokens + budget > capacity:
    raise ConfigError(
      f"{prompt_tokens} tokens of prompt + a budget of {budget} exceed the "
      f"capacity of {capacity}; shorten the prompt, lower max_new_tokens or "
      "raise decode.max_length"
    )


def acceptance_per_position(accepted: Sequence[int]) -> list[float]:
  """Share of rounds that accepted at least i drafts, for i = 1..P.

  Args:
    accepted: rounds by number of drafts accepted, 0..P.
  """
  rounds = sum(accepted)
  return [
    sum(accepted[i:]) / rounds if rounds else 0.0
    for i in range(1, len(accepted))
  ]
