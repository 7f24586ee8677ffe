"""What is asked of an engine, and what it answers."""

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from dflash_jax.config import ConfigError
from dflash_jax.sampling import GREEDY, Sampling
from dflash_jax.serving.prefixes import Page
from dflash_jax.tokenizer import StreamDecoder, Tokenizer

# Called after a dispatch with new token ids and their block slots.
OnTokens = Callable[[list[int], list[int]], None]


class Refused(ConfigError):
  """A request that an engine does not take; says why, and what would help."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One reply that is wanted.

  Attributes:
    prompt: token ids; or what a user says, put into the target's chat template.
    max_new_tokens: its budget.
    sampling: the target's law.
    seed: of its noise, 0..2^32 - 1: with the same seed, the same tokens.
    lane: the engine's model that answers; "" takes the first.
    priority: the lowest goes first; among equals, the first to come.
    stop_ids: tokens that end the reply, and are part of it; None takes the
      target's own.
    stop_strings: texts that end the reply, and are no part of its text.
    shares_prefix: read the prompt's beginning from shared pages, and leave
      pages there.
    on_tokens: streaming callback. on_done: called once, with the Result, also
      when the request failed. Both run in the engine's thread, while the device
      is at work; they may submit and cancel.
  """

  prompt: Sequence[int] | str
  max_new_tokens: int = 128
  sampling: Sampling = GREEDY
  seed: int = 0
  lane: str = ""
  priority: int = 0
  stop_ids: tuple[int, ...] | None = None
  stop_strings: tuple[str, ...] = ()
  shares_prefix: bool = True
  on_tokens: OnTokens | None = None
  on_done: "Callable[[Result], None] | None" = None


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of a request.

  Attributes:
    lane: that answered.
    text: without stop token or stop string.
    tokens: ids, stop token included.
    slots: block slot each token was drafted in; 0 is the target's own.
    finish: "budget", "stop", "string" (a stop string), "cancelled" or "error".
    error: what a callback raised.
    prompt_tokens: in the prompt; hit_tokens: of them, found in shared pages and
      not read.
    rounds: target passes after prefill. tau: tokens per round, bonus included.
    accepted: rounds by number of drafts accepted, 0..D.
    width: drafted nodes verified per round, mean.
    queued_s: from submission until its prompt was begun.
    arrivals: (seconds from submission, tokens so far), each time the host saw
      new ones.
    total_s: from submission to the end.
  """

  lane: str
  text: str
  tokens: list[int]
  slots: list[int]
  finish: str
  error: Exception | None
  prompt_tokens: int
  hit_tokens: int
  rounds: int
  tau: float
  accepted: list[int]
  width: float
  queued_s: float
  arrivals: list[tuple[float, int]]
  total_s: float

  @property
  def ttft_s(self) -> float:
    """Seconds from submission to the first token; 0 if there was none."""
    return self.arrivals[0][0] if self.arrivals else 0.0

  @property
  def itl_s(self) -> list[float]:
    """Seconds before each token after the first.

    Tokens of one dispatch come together: 0 of all of them but one.
    """
    gaps: list[float] = []
    for (before, had), (now, has) in zip(
      self.arrivals, self.arrivals[1:], strict=False
    ):
      gaps += [now - before] + [0.0] * (has - had - 1)
    return gaps

  @property
  def tokens_per_s(self) -> float:
    """Tokens after the first, per second."""
    if len(self.arrivals) < 2:
      return 0.0
    seconds = self.arrivals[-1][0] - self.arrivals[0][0]
    return (len(self.tokens) - 1) / seconds


class Handle:
  """A request in an engine, for whoever submitted it; safe between threads."""

  def __init__(self) -> None:
    self.is_cancelled = False
    self._ended = threading.Event()
    self._result: Result | None = None

  def cancel(self) -> None:
    """Ends the request at the engine's next turn, whatever it is at."""
    self.is_cancelled = True

  @property
  def is_done(self) -> bool:
    """Whether there is a result."""
    return self._ended.is_set()

  def result(self, timeout: float | None = None) -> Result:
    """Waits for the result, up to `timeout` seconds; else TimeoutError.

    Another thread must run the engine meanwhile.
    """
    if not self._ended.wait(timeout):
      raise TimeoutError(f"no result within {timeout} s; is the engine run?")
    assert self._result is not None
    return self._result

  def end(self, result: Result) -> None:
    """The engine's, to say what became of it."""
    self._result = result
    self._ended.set()


@dataclasses.dataclass(eq=False)
class Job:
  """A request on its way through an engine.

  Attributes:
    request, handle: what was asked, and by whom.
    order: of submission.
    prompt: its token ids. stops: tokens that end the reply.
    tokenizer: the target's, if it has one.
    clock: the engine's.
    submitted, started, ended: seconds of the clock; 0 for not yet.
    path: shared pages of its text, referenced.
    hit, read: prompt tokens not read, and those in the caches.
    tokens, slots: of the reply, as far as the host has seen.
    arrivals: as in Result.
    finish, error: as in Result; "" while it goes on.
    statistics: rounds, nodes verified, and rounds by drafts accepted.
    text: up to a stop string, of a request that has some.
  """

  request: Request
  handle: Handle
  order: int
  prompt: list[int]
  stops: tuple[int, ...]
  tokenizer: Tokenizer | None
  clock: Callable[[], float] = time.perf_counter
  submitted: float = dataclasses.field(init=False)
  started: float = 0.0
  ended: float = 0.0
  path: list[Page] = dataclasses.field(default_factory=list)
  hit: int = 0
  read: int = 0
  tokens: list[int] = dataclasses.field(default_factory=list)
  slots: list[int] = dataclasses.field(default_factory=list)
  arrivals: list[tuple[float, int]] = dataclasses.field(default_factory=list)
  finish: str = ""
  error: Exception | None = None
  statistics: tuple[int, int, list[int]] = (0, 0, [])
  text: str = ""
  _sent: int = 0
  _decoder: StreamDecoder | None = None

  def __post_init__(self) -> None:
    self.submitted = self.clock()

  def __lt__(self, other: "Job") -> bool:
    """Who goes first in a queue."""
    mine = self.request.priority, self.order
    return mine < (other.request.priority, other.order)

  @property
  def must_end(self) -> bool:
    """Whether it is to be dropped, wherever it stands."""
    failed = self.handle.is_cancelled or self.error is not None
    return failed and not self.finish

  def take(self, tokens: np.ndarray, slots: np.ndarray, is_over: bool) -> None:
    """Takes in new tokens i64[T]; sees why the reply ends, if it is over."""
    if len(tokens):
      first = len(self.tokens)
      self.tokens += tokens.tolist()
      self.slots += slots.tolist()
      self._look_for_strings(first)
      now = self.clock()
      self.arrivals.append((now - self.submitted, len(self.tokens)))
    if is_over and not self.finish:
      self.end("stop" if self.tokens[-1] in self.stops else "budget")

  def end(self, finish: str) -> None:
    """Notes when and why nothing more comes."""
    self.finish, self.ended = finish, self.clock()

  def send(self) -> None:
    """Calls on_tokens with what it has not seen; keeps what it raises."""
    new = slice(self._sent, len(self.tokens))
    self._sent = new.stop
    on_tokens = self.request.on_tokens
    unwanted = self.error is not None or self.handle.is_cancelled
    if new.start == new.stop or on_tokens is None or unwanted:
      return
    try:
      on_tokens(self.tokens[new], self.slots[new])
    except Exception as error:
      self.error = error

  def complete(self) -> None:
    """Makes the result and hands it out."""
    result = self._result()
    if self.request.on_done is not None:
      try:
        self.request.on_done(result)
      except Exception as error:
        result = dataclasses.replace(result, finish="error", error=error)
    self.handle.end(result)

  def _look_for_strings(self, first: int) -> None:
    """Ends the reply where one of tokens[first:] completes a stop string."""
    strings = self.request.stop_strings
    if not strings or self.tokenizer is None:
      return
    if self._decoder is None:
      self._decoder = StreamDecoder(self.tokenizer)
    for place in range(first, len(self.tokens)):
      self.text += self._decoder.push(self.tokens[place : place + 1])
      found = [self.text.find(string) for string in strings]
      starts = [start for start in found if start >= 0]
      if starts:
        self.text = self.text[: min(starts)]
        del self.tokens[place + 1 :], self.slots[place + 1 :]
        self.end("string")
        return

  def _result(self) -> Result:
    rounds, verified, accepted = self.statistics
    text = self.text
    if self.finish != "string" and self.tokenizer:
      shown = self.tokens[:-1] if self.finish == "stop" else self.tokens
      text = self.tokenizer.decode(shown)
    later = max(len(self.tokens) - 1, 0)
    return Result(
      lane=self.request.lane,
      text=text,
      tokens=self.tokens,
      slots=self.slots,
      finish="error" if self.error else self.finish,
      error=self.error,
      prompt_tokens=len(self.prompt),
      hit_tokens=self.hit,
      rounds=rounds,
      tau=later / rounds if rounds else 0.0,
      accepted=accepted,
      width=verified / max(rounds, 1),
      queued_s=(self.started or self.ended) - self.submitted,
      arrivals=self.arrivals,
      total_s=self.ended - self.submitted,
    )
