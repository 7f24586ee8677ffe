"""Chains in flight, a constant number of them, in each mode of serving.

A server has an engine; a mode says whether it drafts, and whether requests
share prefixes. A chain's next requests are sent from the engine's callbacks.
Servers take turns of a few seconds, so that a machine that slows down for a
while slows all alike; the clock of one that waits for its turn stands still.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax

from dflash_jax.config import ConfigError
from dflash_jax.engine import Engine, EngineConfig, Request, Result
from dflash_jax.model import Model
from dflash_jax.serving.requests import Handle
from eval.chains import Chain, Question

_COMPILED = "/jax/core/compile/backend_compile_duration"  # a JAX event

# Makes the chain of a number, always the same one.
NewChain = Callable[[int], Chain]
# Of a reply: chain, call, copy.
Key = tuple[int, str, int]


@dataclasses.dataclass(frozen=True)
class Mode:
  """A way to serve chains.

  Attributes:
    name: in config.agents.modes.
    drafts: whether the drafter is used.
    shares: whether requests share prefixes.
  """

  name: str
  drafts: bool
  shares: bool


MODES = {
  mode.name: mode
  for mode in (
    Mode("plain", drafts=False, shares=False),
    Mode("plain+shared", drafts=False, shares=True),
    Mode("speculative", drafts=True, shares=False),
    Mode("speculative+shared", drafts=True, shares=True),
  )
}


@dataclasses.dataclass(frozen=True)
class Reply:
  """A request's prompt and what became of it."""

  prompt: tuple[int, ...]
  result: Result


@dataclasses.dataclass
class Run:
  """What one mode made of a number of chains.

  Attributes:
    seconds: of each chain, by number: from its start until its last request's
      result is told.
    replies: of all requests.
    wall_s: seconds with chains in flight.
    idle_s: of them, those in which the device waited for the host's next work.
    peak_bytes: of rows and pages.
    compiled: programs compiled while chains were in flight; none unless
      `rehearse` has missed some.
  """

  seconds: dict[int, float] = dataclasses.field(default_factory=dict)
  replies: dict[Key, Reply] = dataclasses.field(default_factory=dict)
  wall_s: float = 0.0
  idle_s: float = 0.0
  peak_bytes: int = 0
  compiled: list[str] = dataclasses.field(default_factory=list)


def choose_modes(names: Sequence[str]) -> list[Mode]:
  """Modes by name, each once."""
  for name in names:
    if name not in MODES:
      raise ConfigError(
        f"mode {name!r} is unknown; config.agents.modes takes "
        f"{', '.join(MODES)}"
      )
  if not names:
    raise ConfigError(
      f"config.agents.modes is empty; it takes {', '.join(MODES)}"
    )
  return [MODES[name] for name in dict.fromkeys(names)]


class Stopwatch:
  """Seconds for which it has run; stands still until it is started."""

  def __init__(self) -> None:
    self._before = 0.0
    self._since: float | None = None

  def __call__(self) -> float:
    now = time.perf_counter()
    return self._before + (0.0 if self._since is None else now - self._since)

  def start(self) -> None:
    """Lets it run."""
    self._since = time.perf_counter()

  def stop(self) -> None:
    """Lets it stand still."""
    self._before, self._since = self(), None


class Server:
  """An engine that serves chains in one mode."""

  def __init__(self, model: Model, mode: Mode, config: EngineConfig):
    """Allocates nothing.

    Args:
      model: with its drafter; its decode.max_length bounds prompt + reply.
      mode: of serving.
      config: of the engine; prefix_bytes count if the mode shares.
    """
    self.mode = mode
    self.model = model if mode.drafts else model.without_drafter()
    if not mode.shares:
      config = dataclasses.replace(config, prefix_bytes=0)
    self.clock = Stopwatch()
    self.engine = Engine(self.model, config, clock=self.clock)

  def open(self) -> None:
    """Allocates rows and pages, none of which holds anything then."""
    self.engine.submit(Request([0], max_new_tokens=1, shares_prefix=False))
    self.engine.run()

  def serve(
    self, numbers: Iterable[int], concurrency: int, new_chain: NewChain
  ) -> Run:
    """So many chains in flight until all are done; raises as `take_turns`."""
    run = Run()
    for _ in self.take_turns(run, numbers, concurrency, new_chain, math.inf):
      pass
    return run

  def take_turns(
    self,
    run: Run,
    numbers: Iterable[int],
    concurrency: int,
    new_chain: NewChain,
    turn_s: float,
  ) -> Iterator[bool]:
    """So many chains in flight until all are done, with pauses.

    Args:
      run: grows by what is served.
      numbers: of the chains.
      concurrency: chains in flight.
      new_chain: makes a chain.
      turn_s: seconds from one pause to the next, at least. The device has done
        all its work then, and no time passes for the chains in flight.

    Yields:
      True, at each pause.

    Raises:
      ConfigError: a request that the engine refuses.
    """
    waiting = collections.deque(numbers)
    handles: list[Handle] = []

    def start() -> None:
      number = waiting.popleft()
      send(number, new_chain(number), self.clock())

    def send(number: int, chain: Chain, since: float) -> None:
      for question in chain.next_questions():

        def on_done(result: Result, question: Question = question) -> None:
          key = number, question.call.name, question.copy
          prompt = question.conversation.tokens
          run.replies[key] = Reply(prompt, result)
          chain.take(question, result.text, result.tokens)
          send(number, chain, since)
          if chain.is_done:
            run.seconds[number] = self.clock() - since
            if waiting:
              start()

        handles.append(self._submit(question, on_done))

    gaps = self.engine.counters.gaps_s
    first_gap, begun = len(gaps), self.clock()
    is_going = True
    while is_going:
      turn = self.clock()
      self.clock.start()
      with naming_compilations() as compiled:
        if not handles:
          for _ in range(min(concurrency, len(waiting))):
            start()
        while is_going := self.engine.step():
          if self.clock() - turn >= turn_s:
            break
        self.engine.wait()
      self.clock.stop()
      run.compiled += compiled
      if is_going:
        yield True
    run.wall_s = self.clock() - begun
    run.idle_s = sum(gaps[first_gap:])
    run.peak_bytes = self.engine.usage().peak_bytes
    for handle in handles:
      # What a callback raised, such as a refusal of the next request.
      if (error := handle.result(0).error) is not None:
        raise error

  def _submit(
    self, question: Question, on_done: Callable[[Result], None]
  ) -> Handle:
    return self.engine.submit(
      Request(
        question.conversation.tokens,
        max_new_tokens=question.max_new_tokens,
        sampling=question.call.sampling,
        seed=question.seed,
        shares_prefix=self.mode.shares,
        on_done=on_done,
      )
    )


# --- Compilation --------------------------------------------------------------


@contextlib.contextmanager
def naming_compilations() -> Iterator[list[str]]:
  """A list that grows by each program's name as it is compiled."""
  names: list[str] = []

  def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs
    if event == _COMPILED:
      names.append(str(kwargs.get("fun_name", "a program")))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
