"""What eval.suite measures: drafters on prompt sets, interleaved.

Each batch of a prompt set is decoded plainly and by all drafters, one right
after the other, beginning with another of them each time. The drafters of a
prompt set and temperature share the plain decoding they are compared with.
"""

import dataclasses
import datetime
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import tqdm

from dflash_jax.compare import Comparison, take_turns
from dflash_jax.config import (
  AgentsConfig,
  Config,
  ConfigError,
  DraftConfig,
)
from dflash_jax.generate import Batch, align, plan_batches, warm_up
from dflash_jax.model import Model, load
from eval import agents_report, benchmarks, ladder, records, sweep
from eval.benchmarks import Benchmark
from eval.contestants import Contestant, parse
from eval.differences import compare_settings
from eval.prompt_sets import PromptSet
from eval.protocol import PLAIN
from eval.round_time import Sizes, describe_memory, split_round
from eval.workload import Workload

CURVE = "curve"  # the prompt set of a throughput curve


@dataclasses.dataclass(frozen=True)
class Contest:
  """All that a suite measures.

  Attributes:
    config: of the run. output: directory of the records.
    contestants, prompt_sets: in the order of config.suite.
    benchmarks: those among the prompt sets, by name.
    splits: round times, by name and temperature; measured once, at the first
      prompt set's sizes.
  """

  config: Config
  output: pathlib.Path
  contestants: list[Contestant]
  prompt_sets: list[PromptSet]
  benchmarks: dict[str, Benchmark] = dataclasses.field(default_factory=dict)
  splits: dict[tuple[str, float], dict[str, Any]] = dataclasses.field(
    default_factory=dict
  )

  @classmethod
  def plan(cls, config: Config, output: pathlib.Path) -> "Contest":
    """What a config asks for, checked as far as no model is needed.

    Raises:
      ConfigError, PromptError: for what makes no sense, naming the line.
    """
    suite = config.suite
    contestants = parse(suite.drafters)
    if not suite.prompts or not suite.temperatures or config.eval.repeats < 1:
      raise ConfigError(
        "config.suite.prompts and temperatures must each name something, and "
        f"eval.repeats={config.eval.repeats} be at least 1"
      )
    known = {
      name: benchmarks.load(name, suite.data_dir, config.eval.limit)
      for name in suite.prompts
      if name in benchmarks.NAMES
    }
    sets = [
      PromptSet.of(name, known[name].prompts)
      if name in known
      else PromptSet.read(name, config.eval.limit)
      for name in suite.prompts
    ]
    for what, names in (
      ("drafters", [each.name for each in contestants]),
      ("prompts", [each.name for each in sets] + [CURVE]),
      ("temperatures", [f"{value:g}" for value in suite.temperatures]),
    ):
      for name in names:
        if names.count(name) > 1:
          raise ConfigError(
            f"config.suite.{what} has {name!r} twice; rename or drop one"
          )
    for contestant in contestants:
      for temperature in suite.temperatures:
        sweep.check(contestant.decode(config.decode, temperature))
    if suite.concurrency:
      Workload.plan(_curve_config(config, contestants[0]))
    return cls(config, output, contestants, sets, known)

  def run(self, *, has_ladder: bool = False) -> None:
    """Measures what is missing.

    Raises:
      ConfigError: a drafter cannot decode so, or the output holds records
        that were measured otherwise.
    """
    todo = [
      (prompt_set, temperature, missing)
      for temperature in self.config.suite.temperatures
      for prompt_set in self.prompt_sets
      if (missing := self._missing(prompt_set, temperature))
    ]
    curves = [
      each
      for each in self.contestants
      if self.config.suite.concurrency and not self._curve_path(each).exists()
    ]
    if not todo and not curves:
      return
    config = dataclasses.replace(self.config, drafter=DraftConfig())
    base = load(config)
    models = {each.name: self._load(base, each) for each in self.contestants}
    for prompt_set, temperature, missing in todo:
      _Group(self, base, prompt_set, temperature).measure(
        {each: models[each.name] for each in missing}, has_ladder
      )
    for contestant in curves:
      self._measure_curve(contestant, models[contestant.name])

  def config_of(self, contestant: Contestant, temperature: float) -> Config:
    """The run's config as this measurement has it."""
    return dataclasses.replace(
      self.config,
      drafter=dataclasses.replace(self.config.drafter, path=contestant.path),
      decode=contestant.decode(self.config.decode, temperature),
    )

  def path(
    self, prompt_set: PromptSet, contestant: Contestant, temperature: float
  ) -> pathlib.Path:
    """Of a record."""
    name = f"{prompt_set.name}.{contestant.name}.t{temperature:g}.json"
    return self.output / name

  def _curve_path(self, contestant: Contestant) -> pathlib.Path:
    return self.output / f"{CURVE}.{contestant.name}.json"

  def _load(self, base: Model, contestant: Contestant) -> Model:
    """The contestant, once it has been seen to decode at all temperatures."""
    source = dataclasses.replace(self.config.drafter, path=contestant.path)
    model = base.with_drafter(source)
    for temperature in self.config.suite.temperatures:
      decode = contestant.decode(self.config.decode, temperature)
      try:
        sweep.adapt(model, decode).decoder()
      except ConfigError as error:
        raise ConfigError(f"drafter {contestant.name!r}: {error}") from error
    return model

  def _missing(
    self, prompt_set: PromptSet, temperature: float
  ) -> list[Contestant]:
    """Who has no record yet.

    Raises:
      ConfigError: one was measured otherwise.
    """
    missing = []
    for contestant in self.contestants:
      path = self.path(prompt_set, contestant, temperature)
      if not path.exists():
        missing.append(contestant)
        continue
      wanted = records.circumstances(self.config_of(contestant, temperature))
      wanted["prompt_set"] = prompt_set.describe()
      _check_same(path, wanted)
    return missing

  def _measure_curve(self, contestant: Contestant, model: Model) -> None:
    """Throughput against interactivity, on the engine."""
    config = _curve_config(self.config, contestant)
    model = dataclasses.replace(model, config=config)
    workload = Workload.plan(config)
    sizes = workload.describe(model)
    found: list[dict[str, Any]] = []
    for measurement in workload.measure(model):
      found += agents_report.summarize(measurement)
    record = agents_report.to_record(config, sizes, found)
    record = {"drafter": contestant.name, **record}
    path = str(self._curve_path(contestant))
    records.write_whole(path, records.to_json(record), "--output")
    tqdm.tqdm.write(f"wrote {path}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class _Group:
  """A prompt set at a temperature: what is decoded in turns."""

  contest: Contest
  base: Model
  prompt_set: PromptSet
  temperature: float

  def measure(self, models: dict[Contestant, Model], has_ladder: bool) -> None:
    """Decodes by all of them and writes their records."""
    settings = self.contest.config.eval
    decode = dataclasses.replace(
      self.contest.config.decode, temperature=self.temperature
    )
    plain = sweep.plain_model(self.base, decode)
    ready = {
      each: sweep.adapt(model, each.decode(decode, self.temperature))
      for each, model in models.items()
    }
    batches = align(
      plan_batches(
        plain,
        self.prompt_set.prompts,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
      )
    )
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    turns = [plain, *ready.values()]
    found = self._decode(turns, batches)
    sizes = Sizes(batches[0].rows, batches[0].capacity, settings.max_new_tokens)
    around = {"prompts": self.prompt_set.name, "began": began}
    for (contestant, model), ours in zip(ready.items(), found[1:], strict=True):
      guarantee = model.decoder().guarantee
      comparisons = [
        Comparison(ours[place], found[0][place], guarantee)
        for place in range(len(ours))
      ]
      record = {"drafter": contestant.name, "interleaved": around} | (
        records.to_record(
          self.contest.config_of(contestant, self.temperature),
          len(self.prompt_set.prompts),
          model.decoder().rule,
          comparisons,
          model.drafter_bytes,
          self.prompt_set,
        )
      )
      if benchmark := self.contest.benchmarks.get(self.prompt_set.name):
        record |= benchmarks.measure(
          benchmark, comparisons, max_new_tokens=settings.max_new_tokens
        )
      record["round_time"] = self._split(contestant.name, model, sizes)
      record["plain_round_time"] = self._split(PLAIN, plain, sizes)
      record["memory"] = describe_memory(model, sizes)
      if has_ladder:
        record["ladder"] = ladder.climb(model, batches, comparisons)
      path = self.contest.path(self.prompt_set, contestant, self.temperature)
      records.write_whole(str(path), records.to_json(record), "--output")
      tqdm.tqdm.write(f"wrote {path}", file=sys.stderr)

  def _split(self, name: str, model: Model, sizes: Sizes) -> dict[str, Any]:
    key, known = (name, self.temperature), self.contest.splits
    if key not in known:
      known[key] = split_round(model, sizes)
    return known[key]

  def _decode(
    self, models: Sequence[Model], batches: Sequence[Batch]
  ) -> list[dict[int, Any]]:
    """Completions by place, of each model."""
    found: list[dict[int, Any]] = [{} for _ in models]
    label = f"{self.prompt_set.name}, temperature {self.temperature:g}"
    steps = len(models) + len(batches)
    with tqdm.tqdm(total=steps, desc=label, disable=None) as bar:
      for model in models:
        warm_up(model, batches)
        bar.update()
      for number, batch in enumerate(batches):
        turns = take_turns(
          models,
          batch,
          repeats=self.contest.config.eval.repeats,
          first=number % len(models),
        )
        for mine, completions in zip(found, turns, strict=True):
          mine.update(completions)
        bar.update()
    return found


def _curve_config(config: Config, contestant: Contestant) -> Config:
  """Independent requests, first turns of the suite's prompt files, as chains.

  No system prompt, nothing shared: what varies is the number in flight.
  """
  decode = contestant.decode(config.decode, 0.0)
  return dataclasses.replace(
    config,
    drafter=dataclasses.replace(config.drafter, path=contestant.path),
    decode=decode,
    agents=dataclasses.replace(
      config.agents,
      calls=("requests/reply: {task}",),
      workflows=(),
      modes=("plain", "speculative"),
      concurrency=config.suite.concurrency,
      system="",
      tasks=tuple(
        path for path in config.suite.prompts if path not in benchmarks.NAMES
      ),
      max_new_tokens=config.eval.max_new_tokens,
      prefix_bytes=AgentsConfig().prefix_bytes,
    ),
  )


def _check_same(path: pathlib.Path, wanted: dict[str, Any]) -> None:
  """Raises ConfigError unless a record was measured as wanted."""
  try:
    there = json.loads(path.read_text(encoding="utf-8"))
    changes = compare_settings(there, json.loads(json.dumps(wanted)))
  except (OSError, ValueError, AttributeError, KeyError) as error:
    raise ConfigError(
      f"{path} is not a record of eval.suite ({error}); delete it, or choose "
      "another --output"
    ) from error
  # Names, dates, and who else takes part decide nothing.
  free = ("config.suite.", "config.name", "date")
  changes = [each for each in changes if not each.name.startswith(free)]
  if changes:
    shown = "; ".join(str(change) for change in changes[:5])
    raise ConfigError(
      f"{path} was measured otherwise: {shown}. Delete it, or choose another "
      "--output"
    )
