"""Every drafter of a grid on the same prompts, interleaved in one process.

Each batch of prompts is decoded plainly and then by all drafters of a seed, one
right after the other, with everything compiled: a machine that slows down for a
while slows all alike. What has been found is written batch by batch, and not
looked for again.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import tqdm

from dflash_jax.compare import take_turns
from dflash_jax.config import ConfigError, DraftConfig
from dflash_jax.generate import Batch, align, plan_batches, warm_up
from dflash_jax.model import Model, load
from dflash_jax.session import Completion
from eval import sweep
from eval.prompt_sets import PromptSet
from train.ablation.grid import Grid, Trial
from train.ablation.results import Record, Results


@dataclasses.dataclass(frozen=True, eq=False)
class Contestant:
  """A drafter, decoding in one way.

  Attributes:
    trial: whose drafter.
    point: how.
    model: ready to decode so.
  """

  trial: Trial
  point: sweep.Point
  model: Model

  @property
  def who(self) -> Record:
    """What tells its records from others'."""
    return {
      "arm": self.trial.arm.name,
      "seed": self.trial.seed,
      "point": point_name(self.point),
    }


def point_name(point: sweep.Point) -> str:
  """A point as its line would say it."""
  return " ".join(f"{name}={value}" for name, value in point.settings.items())


def judge(grid: Grid, results: Results) -> None:
  """Decodes what has not been decoded yet by the drafters that are there.

  One seed after the other, so that no more drafters are in memory than there
  are arms.

  Raises:
    FileError: when the disk refuses the results.
    WeightsError: for a drafter that cannot be loaded.
  """
  config = dataclasses.replace(grid.config, drafter=DraftConfig())
  ready = [trial for trial in grid.trials if trial.is_complete]
  base: Model | None = None
  for seed in dict.fromkeys(trial.seed for trial in ready):
    trials = [trial for trial in ready if trial.seed == seed]
    if not _missing(grid, trials, results):
      continue
    base = base or load(config)
    _judge_seed(grid, base, trials, results)


def _missing(
  grid: Grid, trials: Sequence[Trial], results: Results
) -> list[tuple[Trial, sweep.Point]]:
  """Who has not decoded every prompt yet, and was not refused."""
  done = _keys(results)
  refused = {_who(record) for record in results.of_kind("refusal")}
  return [
    (trial, point)
    for trial, point in itertools.product(trials, grid.points)
    if (who := (trial.arm.name, trial.seed, point_name(point))) not in refused
    and any(
      (*who, prompt_set.name, place) not in done
      for prompt_set in grid.prompt_sets
      for place in range(_count_replies(prompt_set))
    )
  ]


def _judge_seed(
  grid: Grid, base: Model, trials: Sequence[Trial], results: Results
) -> None:
  """Decodes with the drafters of one seed."""
  models = {
    trial.name: base.with_drafter(
      dataclasses.replace(trial.config.drafter, path=str(trial.drafter))
    )
    for trial in trials
  }
  contestants = []
  for trial, point in _missing(grid, trials, results):
    model = sweep.adapt(models[trial.name], point.decode)
    contestant = Contestant(trial, point, model)
    try:
      model.decoder()
    except ConfigError as error:
      refusal = {"kind": "refusal", **contestant.who, "why": str(error)}
      results.add([refusal])
    else:
      contestants.append(contestant)
  for members in sweep.group(grid.points):
    group = [c for c in contestants if c.point in members]
    plain = sweep.plain_model(base, members[0].decode)
    for prompt_set in grid.prompt_sets:
      if group:
        _judge_group(grid, plain, group, prompt_set, results)


def _judge_group(
  grid: Grid,
  plain: Model,
  contestants: Sequence[Contestant],
  prompt_set: PromptSet,
  results: Results,
) -> None:
  """Decodes one file of prompts by drafters that share a law."""
  settings = grid.config.eval
  batches = align(
    plan_batches(
      plain,
      prompt_set.prompts,
      max_new_tokens=settings.max_new_tokens,
      batch_size=settings.batch_size,
    )
  )
  done = _keys(results)

  def lacking(contestant: Contestant, batch: Batch) -> list[int]:
    who = (*_who(contestant.who), prompt_set.name)
    return [place for place in _places(batch) if (*who, place) not in done]

  todo = [c for c in contestants if any(lacking(c, batch) for batch in batches)]
  steps = len(todo) * (1 + len(batches) * settings.repeats)
  with tqdm.tqdm(total=steps, desc=prompt_set.name, disable=None) as bar:
    for contestant in todo:
      warm_up(contestant.model, batches)
      bar.update()
    if todo:
      warm_up(plain, batches)
    for batch in batches:
      now = [c for c in todo if lacking(c, batch)]
      if not now:
        continue
      theirs, *ours = take_turns(
        [plain, *(c.model for c in now)], batch, repeats=settings.repeats
      )
      bar.update(len(now) * settings.repeats)
      results.add(
        {
          "kind": "reply",
          **contestant.who,
          "prompts": prompt_set.name,
          "place": place,
          "guarantee": contestant.model.decoder().guarantee,
          **_describe(ours[number][place], theirs[place]),
        }
        for number, contestant in enumerate(now)
        for place in lacking(contestant, batch)
      )


def _describe(reply: Completion, plain: Completion) -> Record:
  """A reply, decoded with a drafter and without.

  tau as Completion has it; seconds per token after the first.
  """
  return {
    "tau": reply.tau,
    "rounds": reply.rounds,
    "tokens": len(reply.tokens),
    "seconds": reply.tpot_s,
    "plain_seconds": plain.tpot_s,
    "identical": reply.tokens == plain.tokens,
  }


def _places(batch: Batch) -> Iterator[int]:
  """Where the replies of a batch stand in the result."""
  for prompt, place in zip(batch.prompts, batch.places, strict=True):
    yield from range(place, place + len(prompt.turns))


def _count_replies(prompt_set: PromptSet) -> int:
  return sum(len(prompt.turns) for prompt in prompt_set.prompts)


def _who(record: Record) -> tuple[str, int | None, str]:
  return record["arm"], record["seed"], record["point"]


def _keys(results: Results) -> set[tuple[str, int | None, str, str, int]]:
  """The replies there are."""
  return {
    (*_who(record), record["prompts"], record["place"])
    for record in results.of_kind("reply")
  }
