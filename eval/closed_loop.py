"""Chains in flight, a constant number of them, in each mode of serving.

A server has an engine; a mode says whether it drafts, and whether requests
share prefixes. A chain's next requests are sent from the engine's callbacks.
"""

import collections
import contextlib
import dataclasses
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
    self.engine = Engine(self.model, config)

  def open(self) -> None:
    """Allocates rows and pages, none of which holds anything then."""
    self.engine.submit(Request([0], max_new_tokens=1, shares_prefix=False))
    self.engine.run()

  def serve(
    self, numbers: Iterable[int], concurrency: int, new_chain: NewChain
  ) -> Run:
    """A wave: so many chains in flight until all are done.

    Raises:
      ConfigError: a request that the engine refuses.
    """
    run, waiting = Run(), collections.deque(numbers)
    handles: list[Handle] = []

    def start() -> None:
      number = waiting.popleft()
      send(number, new_chain(number), time.perf_counter())

    def send(number: int, chain: Chain, since: float) -> None:
      for question in chain.next_questions():

        def on_done(result: Result, question: Question = question) -> None:
          key = number, question.call.name, question.copy
          prompt = question.conversation.tokens
          run.replies[key] = Reply(prompt, result)
          chain.take(question, result.text, result.tokens)
          send(number, chain, since)
          if chain.is_done:
            run.seconds[number] = time.perf_counter() - since
            if waiting:
              start()

        handles.append(self._submit(question, on_done))

    gaps = self.engine.counters.gaps_s
    first_gap = len(gaps)
    begun = time.perf_counter()
    with naming_compilations() as run.compiled:
      for _ in range(min(concurrency, len(waiting))):
        start()
      self.engine.run()
    run.wall_s = time.perf_counter() - begun
    run.idle_s = sum(gaps[first_gap:])
    run.peak_bytes = self.engine.usage().peak_bytes
    for handle in handles:
      # What a callback raised, such as a refusal of the next request.
      if (error := handle.result(0).error) is not None:
        raise error
    return run

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
