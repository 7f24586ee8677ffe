"""What eval.agents measures: workflows, modes and tasks of a config.

Modes take turns of a few seconds, see closed_loop.py. Everything is compiled,
and what rounds cost is measured, before any clock starts.
"""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tqdm

from dflash_jax.config import AgentsConfig, Config, ConfigError
from dflash_jax.engine import EngineConfig
from dflash_jax.model import Model
from dflash_jax.prompts import read_prompts
from dflash_jax.session import check_fits
from eval import workflows
from eval.chains import Chain, Conversation
from eval.closed_loop import Mode, NewChain, Run, Server, choose_modes
from eval.rehearsal import rehearse
from eval.workflows import Workflow

TURN_S = 5.0  # of one mode, before the next one's


@dataclasses.dataclass(frozen=True)
class Measurement:
  """The same chains, served in each mode.

  Attributes:
    workflow: of the chains.
    concurrency: chains in flight.
    runs: by mode; the first is what others are compared with.
  """

  workflow: Workflow
  concurrency: int
  runs: dict[str, Run]


@dataclasses.dataclass(frozen=True)
class Workload:
  """Everything that is to be measured.

  Attributes:
    settings: config.agents.
    workflows, modes: of them, in order.
    system: the system prompt; "" for none.
    tasks: chain by chain; each measurement begins with the first.
  """

  settings: AgentsConfig
  workflows: list[Workflow]
  modes: list[Mode]
  system: str
  tasks: list[str]

  @classmethod
  def plan(cls, config: Config) -> "Workload":
    """What a config asks for, checked as far as no model is needed.

    Raises:
      ConfigError, PromptError: for what makes no sense.
    """
    settings = config.agents
    found = workflows.parse(settings.calls)
    chosen = workflows.choose(found, settings.workflows)
    modes = choose_modes(settings.modes)
    for name in ("concurrency", "rows"):
      values = getattr(settings, name)
      if not values or min(values) < 1:
        raise ConfigError(
          f"config.agents.{name}={values} needs numbers, each at least 1"
        )
    if settings.chains < 1 or settings.max_new_tokens < 1:
      raise ConfigError(
        f"config.agents.chains={settings.chains} and max_new_tokens="
        f"{settings.max_new_tokens} must be at least 1"
      )
    if config.drafter.path == "none" and any(mode.drafts for mode in modes):
      raise ConfigError(
        "there is no drafter for the speculative modes; name its directory in "
        "--drafter or drafter.path, or leave them out of config.agents.modes"
      )
    return cls(
      settings, chosen, modes, _read_system(settings), _read_tasks(settings)
    )

  def describe(self, model: Model) -> dict[str, Any]:
    """Sizes of what is to be run.

    Raises:
      ConfigError: a conversation may exceed the model's decode.max_length.
    """
    opening = self._opening(model)
    first, second = opening.ask("a").tokens, opening.ask("b").tokens
    pairs = itertools.takewhile(
      lambda pair: pair[0] == pair[1], zip(first, second, strict=False)
    )
    return {
      "common_tokens": len(list(pairs)),
      "workflows": [
        {
          "name": workflow.name,
          "requests": workflow.num_requests,
          "depth": workflow.depth,
          "longest_tokens": check_capacity(
            model,
            workflow,
            (
              self._chain(opening, workflow, number)
              for number in range(len(self.tasks))
            ),
          ),
        }
        for workflow in self.workflows
      ],
    }

  def measure(self, model: Model) -> Iterator[Measurement]:
    """Serves all chains; a Measurement per workflow and concurrency."""
    settings, opening = self.settings, self._opening(model)
    passes = [
      (workflow, concurrency, count_chains(settings.chains, concurrency))
      for workflow in self.workflows
      for concurrency in settings.concurrency
    ]
    total = sum(chains for *_, chains in passes) * len(self.modes)
    with tqdm.tqdm(total=total, unit="chain", disable=None) as bar:
      bar.set_description("compiling, measuring costs")
      self._rehearse(model)
      for workflow, concurrency, chains in passes:
        bar.set_description(f"{workflow.name}, {concurrency} in flight")

        def new_chain(number: int, workflow: Workflow = workflow) -> Chain:
          return self._chain(opening, workflow, number)

        config = self.engine_config(workflow.breadth * concurrency)
        servers = [Server(model, mode, config) for mode in self.modes]
        runs = serve_in_turns(
          servers, range(chains), concurrency, new_chain, on_chains=bar.update
        )
        yield Measurement(workflow, concurrency, runs)

  def engine_config(self, rows: int) -> EngineConfig:
    """Of an engine that holds so many requests at a time, if it may.

    All of them have rows of equal shapes, and so share what is compiled.
    """
    settings = self.settings
    enough = [size for size in settings.rows if size >= rows]
    most = min(enough, default=max(settings.rows))
    calls = [call for workflow in self.workflows for call in workflow.calls]
    return EngineConfig(
      sizes=tuple(size for size in settings.rows if size <= most),
      queue=rows * max(each.num_requests for each in self.workflows),
      max_new_tokens=max(
        call.tokens or settings.max_new_tokens for call in calls
      ),
      prefix_bytes=settings.prefix_bytes,
      memory_bytes=settings.memory_bytes,
    )

  def _rehearse(self, model: Model) -> None:
    """Compiles what any measurement may run."""
    breadth = max(workflow.breadth for workflow in self.workflows)
    config = self.engine_config(breadth * max(self.settings.concurrency))
    calls = [call for workflow in self.workflows for call in workflow.calls]
    laws = list(dict.fromkeys(call.sampling for call in calls))
    modes: dict[bool, Mode] = {}
    for mode in sorted(self.modes, key=lambda mode: mode.shares):
      modes[mode.drafts] = mode  # sharing runs all that others do, and more
    for mode in modes.values():
      rehearse(model, mode, config, laws)

  def _opening(self, model: Model) -> Conversation:
    """What all conversations begin with."""
    if model.tokenizer is None:
      raise ConfigError("this model has no tokenizer, so it cannot chat")
    system = {"role": "system", "content": self.system}
    return Conversation(
      model.tokenizer, model.stop_ids, (system,) if self.system else ()
    )

  def _chain(
    self, opening: Conversation, workflow: Workflow, number: int
  ) -> Chain:
    return Chain(
      workflow,
      self.tasks[number],
      opening,
      max_new_tokens=self.settings.max_new_tokens,
      seed=(self.settings.seed, number),
    )


def serve_in_turns(
  servers: Sequence[Server],
  numbers: Sequence[int],
  concurrency: int,
  new_chain: NewChain,
  *,
  turn_s: float = TURN_S,
  on_chains: Callable[[int], Any] = lambda count: None,
) -> dict[str, Run]:
  """The same chains on each server, in turns.

  Shared pages are empty at a server's first chain, and stay from then on: what
  later chains find there is what a service would.

  Args:
    servers: new, each of another mode; closed in the end.
    numbers: of chains.
    concurrency: chains in flight.
    new_chain: makes a chain.
    turn_s: seconds of a turn.
    on_chains: called after each turn, with how many chains it has ended.

  Returns:
    A Run by each mode's name.
  """
  runs = {server.mode.name: Run() for server in servers}
  going: collections.deque[tuple[Run, Iterator[bool]]] = collections.deque()
  for server in servers:
    server.open()
    run = runs[server.mode.name]
    turns = server.take_turns(run, numbers, concurrency, new_chain, turn_s)
    going.append((run, turns))
  while going:
    run, turns = going.popleft()
    before = len(run.seconds)
    if next(turns, False):
      going.append((run, turns))
    on_chains(len(run.seconds) - before)
  for server in servers:
    server.engine.close()
  return runs


def count_chains(chains: int, concurrency: int) -> int:
  """Chains of a measurement: so many, and no fewer than are in flight."""
  return max(chains, concurrency)


def check_capacity(
  model: Model, workflow: Workflow, chains: Iterable[Chain]
) -> int:
  """Walks chains as if every reply took its whole budget.

  Args:
    model: whose decode.max_length bounds prompt + reply.
    workflow: of the chains.
    chains: of which nothing has been sent; used up.

  Returns:
    Tokens of the longest prompt + reply.

  Raises:
    ConfigError: it exceeds the capacity.
  """
  assert model.tokenizer is not None
  word = model.tokenizer.encode(" the")[-1]
  most = 0
  for chain in chains:
    while questions := chain.next_questions():
      for question in questions:
        prompt, budget = question.conversation.tokens, question.max_new_tokens
        try:
          check_fits(len(prompt), budget, model.config.decode.max_length)
        except ConfigError as error:
          name = f"{workflow.name}/{question.call.name}"
          raise ConfigError(
            f"call {name!r}, if all replies are as long as they may be: {error}"
          ) from error
        most = max(most, len(prompt) + budget)
        reply = [word] * budget
        chain.take(question, model.tokenizer.decode(reply), reply)
  return most


def _read_system(settings: AgentsConfig) -> str:
  if not settings.system:
    return ""
  try:
    return pathlib.Path(settings.system).read_text(encoding="utf-8").strip()
  except (OSError, UnicodeDecodeError) as error:
    raise ConfigError(
      f"config.agents.system={settings.system!r} cannot be read: {error}; name "
      "a text file, or leave it empty"
    ) from error


def _read_tasks(settings: AgentsConfig) -> list[str]:
  """As many tasks as the longest measurement has chains."""
  needed = max(
    count_chains(settings.chains, concurrency)
    for concurrency in settings.concurrency
  )
  if not settings.tasks:
    raise ConfigError(
      "config.agents.tasks is empty; name files of JSON lines with 'prompt', "
      "'question' or 'turns'"
    )
  tasks = [
    prompt.turns[0] for path in settings.tasks for prompt in read_prompts(path)
  ]
  if len(tasks) < needed:
    raise ConfigError(
      f"{needed} chains of a measurement need as many tasks, and "
      f"{', '.join(settings.tasks)} has {len(tasks)}; name more files in "
      "config.agents.tasks, or lower --chains or --concurrency"
    )
  return tasks[:needed]
