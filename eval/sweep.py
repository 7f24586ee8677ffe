"""Many ways to decode the same prompts: every point of a sweep, fairly timed.

A sweep is written in lines. A line is a product of axes, fields of
DecodeConfig with the values they take: "width=fixed:1,goodput" is two points,
"temperature=1 rule=token,block draft_temperature=0.5,1" is four.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import tqdm

from dflash_jax.compare import Comparison
from dflash_jax.config import Config, ConfigError, DecodeConfig, EvalConfig
from dflash_jax.generate import Batch, answer, plan_batches, warm_up
from dflash_jax.model import Model
from dflash_jax.prompts import Prompt
from dflash_jax.sampling import Sampling
from dflash_jax.verify import RULES
from dflash_jax.width import parse_width

# The first five decide what plain decoding says; the rest only how soon.
LAW = ("temperature", "top_k", "top_p", "min_p", "seed")
AXES = (
  *LAW,
  "rule",
  "draft_temperature",
  "draft_top_k",
  "block_size",
  "tree_nodes",
  "width",
)
_EXAMPLE = "'width=fixed:1,fixed:3 tree_nodes=0,16'"


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
  """One way to decode; no two of a sweep are equal.

  Attributes:
    line: of the sweep, the first that names the point.
    settings: the fields that the line sets, typed.
    decode: the run's, with those fields replaced.
  """

  line: str
  settings: dict[str, Any]
  decode: DecodeConfig

  @property
  def law(self) -> tuple[Any, ...]:
    """Points of one law share their plain decoding."""
    return tuple(getattr(self.decode, name) for name in LAW)


@dataclasses.dataclass(frozen=True)
class Result:
  """What became of a point.

  Attributes:
    point: of the sweep.
    rule: of verification, the default resolved; "" if the point was refused.
    comparisons: one per reply and pass, batch after batch.
    refusal: why there are none, or "".
  """

  point: Point
  rule: str = ""
  comparisons: Sequence[Comparison] = ()
  refusal: str = ""


def plan(config: Config) -> list[Point]:
  """The points of config.eval.sweep, checked as far as no model is needed."""
  if config.drafter.path == "none":
    raise ConfigError(
      "there is no drafter to sweep; name its directory in --drafter or "
      "drafter.path"
    )
  if config.eval.repeats < 1:
    raise ConfigError(
      f"eval.repeats={config.eval.repeats} measures nothing; use at least 1"
    )
  return parse(config.eval.sweep, config.decode)


def parse(lines: Sequence[str], base: DecodeConfig) -> list[Point]:
  """The union of the lines' points, in order, each once.

  Args:
    lines: see the module.
    base: what a point has where its line says nothing.

  Raises:
    ConfigError: for a line or a value that makes no sense by itself.
  """
  points: dict[tuple[Any, ...], Point] = {}
  for line in lines:
    for settings in _multiply(line):
      decode = dataclasses.replace(base, **settings)
      try:
        check(decode)
      except ConfigError as error:
        raise ConfigError(f"eval.sweep, line {line!r}: {error}") from error
      point = Point(line, settings, decode)
      points.setdefault(dataclasses.astuple(decode), point)
  if not points:
    raise ConfigError(f"eval.sweep is empty; give lines like {_EXAMPLE}")
  return list(points.values())


def _multiply(line: str) -> list[dict[str, Any]]:
  """The settings of a line's points; the last axis changes fastest."""
  where = f"eval.sweep, line {line!r}:"
  axes: dict[str, list[Any]] = {}
  for word in line.split():
    name, _, values = word.partition("=")
    if name not in AXES:
      raise ConfigError(
        f"{where} {name!r} is no axis; choose from {', '.join(AXES)}"
      )
    if name in axes:
      raise ConfigError(
        f"{where} {name} stands there twice; join its values by commas"
      )
    axes[name] = [read_value(name, text, where) for text in values.split(",")]
  if not axes:
    raise ConfigError(f"{where} no axis; write one like {_EXAMPLE}")
  return [
    dict(zip(axes, values, strict=True))
    for values in itertools.product(*axes.values())
  ]


def read_value(name: str, text: str, where: str) -> Any:
  """A value of a field of DecodeConfig; `where` begins complaints."""
  kind = type(getattr(DecodeConfig(), name))
  try:
    if not text:
      raise ValueError
    return kind(text)
  except ValueError as error:
    raise ConfigError(
      f"{where} {name} takes values of type {kind.__name__}, not {text!r}; "
      "join them by commas without spaces"
    ) from error


def check(decode: DecodeConfig) -> None:
  """Raises ConfigError for a value that no model could be given."""
  Sampling(*(getattr(decode, name) for name in LAW[:4]))
  try:
    Sampling(decode.draft_temperature, decode.draft_top_k)
  except ConfigError as error:
    raise ConfigError(f"draft_{error}") from error
  if decode.width:
    parse_width(decode.width)
  if decode.rule and decode.rule not in RULES:
    raise ConfigError(
      f"rule={decode.rule!r} is unknown; choose one of {', '.join(RULES)}"
    )
  for name in ("seed", "block_size", "tree_nodes"):
    value = getattr(decode, name)
    if value < 0:
      raise ConfigError(f"{name}={value} is impossible; use 0 or more")


def group(points: Sequence[Point]) -> list[list[Point]]:
  """Points by law, in order of first appearance."""
  groups: dict[tuple[Any, ...], list[Point]] = {}
  for point in points:
    groups.setdefault(point.law, []).append(point)
  return list(groups.values())


def evaluate(
  model: Model,
  prompts: Sequence[Prompt],
  points: Sequence[Point],
  settings: EvalConfig,
) -> list[Result]:
  """Decodes the prompts plainly, and as every point says.

  Each batch of prompts is decoded plainly and then by all points of that law,
  one right after the other, with everything compiled: a machine that slows
  down for a while slows all alike.

  Args:
    model: with its drafter.
    prompts: the first settings.limit are used.
    points: from `plan` or `parse`.
    settings: limit, max_new_tokens, batch_size and repeats count.

  Returns:
    A Result per point, in order; a refused one has no comparisons.
  """
  results = {point: _prepare(model, point) for point in points}
  ready = [p for p in points if not results[p].refusal]
  batches = plan_batches(
    model,
    prompts[: settings.limit or None],
    max_new_tokens=settings.max_new_tokens,
    batch_size=settings.batch_size,
  )
  groups = group(ready)
  passes = len(batches) * settings.repeats
  # Compiling a point counts as one step, and so does each batch it decodes.
  steps = (len(ready) + len(groups)) * (1 + passes)
  with tqdm.tqdm(total=steps, unit="run", disable=None) as bar:
    for members in groups:
      found = _evaluate_group(model, members, batches, settings.repeats, bar)
      for point, comparisons in zip(members, found, strict=True):
        results[point] = dataclasses.replace(
          results[point], comparisons=comparisons
        )
  return list(results.values())


def adapt(model: Model, decode: DecodeConfig) -> Model:
  """The same weights, decoding as told."""
  config = dataclasses.replace(model.config, decode=decode)
  return dataclasses.replace(model, config=config)


def _prepare(model: Model, point: Point) -> Result:
  """The point's Result so far: its rule, or why it cannot be."""
  try:
    return Result(point, rule=adapt(model, point.decode).decoder().rule)
  except ConfigError as error:
    return Result(point, refusal=str(error))


def _evaluate_group(
  model: Model,
  points: Sequence[Point],
  batches: Sequence[Batch],
  repeats: int,
  bar: tqdm.tqdm,
) -> list[list[Comparison]]:
  """The comparisons of each point; all share one law."""
  plain = plain_model(model, points[0].decode)
  models = [adapt(model, point.decode) for point in points]
  for each in (plain, *models):
    bar.set_description("compiling")
    warm_up(each, batches)
    bar.update()
  bar.set_description("decoding")
  found: list[list[Comparison]] = [[] for _ in models]
  for batch in (batch for batch in batches for _ in range(repeats)):
    theirs = dict(answer(plain, batch))
    bar.update()
    for comparisons, each in zip(found, models, strict=True):
      guarantee = each.decoder().guarantee
      for place, ours in answer(each, batch):
        comparisons.append(Comparison(ours, theirs[place], guarantee))
      bar.update()
  return found


def plain_model(model: Model, decode: DecodeConfig) -> Model:
  """Plain decoding by a point's law, whatever else the point says."""
  law = {name: getattr(decode, name) for name in LAW}
  rest = {name: getattr(DecodeConfig(), name) for name in AXES[len(LAW) :]}
  decode = dataclasses.replace(decode, **law, **rest)
  return adapt(model.without_drafter(), decode)
