"""The runs that an ablation asks for: arms, each with every seed.

An arm is a line of config.ablation.arms, "NAME: field=value ...": how it
differs from the config, in the words that would follow --config. on a command
line. One factor at a time from the first arm, and whatever combinations have a
name: no product is formed.
"""

import ast
import copy
import dataclasses
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dflash_jax import config_file
from dflash_jax.config import Config, ConfigError
from eval import sweep
from eval.prompt_sets import PromptSet

SECTIONS = ("drafter", "train")  # what an arm may change
_EXAMPLE = "'wide: drafter.mlp_width=2048 \"train.loss=0.5*ce + 0.5*kl\"'"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
  """One way to draft.

  Attributes:
    name: of its directory and its row in tables.
    settings: dotted names of fields, with their values as text.
    config: the run's, with these.
  """

  name: str
  settings: dict[str, str]
  config: Config

  @property
  def is_trained(self) -> bool:
    """Whether there is anything to train."""
    return self.config.drafter.path == "none"


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
  """An arm with one seed.

  Attributes:
    arm: of the grid.
    seed: None for an arm that is judged as it is.
    config: the arm's, with this seed.
    workdir: of its run.
  """

  arm: Arm
  seed: int | None
  config: Config
  workdir: pathlib.Path

  @property
  def name(self) -> str:
    """For a person."""
    return self.arm.name + ("" if self.seed is None else f", seed {self.seed}")

  @property
  def drafter(self) -> pathlib.Path | str:
    """What decodes: the exported directory, or what the arm names."""
    if self.seed is None:
      return self.config.drafter.path
    return self.workdir / "drafter"

  @property
  def is_complete(self) -> bool:
    """Whether it can be judged; an export is there whole or not at all."""
    return self.seed is None or (self.workdir / "drafter").is_dir()


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two arms to compare: `arm` as a multiple of `base`, and a note on it."""

  arm: str
  base: str
  note: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
  """Everything an ablation trains and judges.

  Attributes:
    config: of the ablation.
    arms, pairs, prompt_sets: in its order.
    trials: all arms with the first seed, then all with the second.
    points: ways to decode, from config.eval.sweep.
  """

  config: Config
  arms: list[Arm]
  trials: list[Trial]
  pairs: list[Pair]
  prompt_sets: list[PromptSet]
  points: list[sweep.Point]

  @classmethod
  def plan(cls, config: Config, workdir: pathlib.Path) -> "Grid":
    """The grid of a config, checked as far as no model is needed.

    Raises:
      ConfigError, PromptError: for what makes no sense, naming arm or line.
    """
    settings = config.ablation
    arms = parse_arms(settings.arms, config)
    if not any(arm.is_trained for arm in arms):
      raise ConfigError(
        "ablation.arms has nothing to train; compare drafters that exist with "
        "eval.main"
      )
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
      raise ConfigError(
        f"ablation.seeds={settings.seeds} must name at least one seed, each "
        "once"
      )
    if not settings.prompts:
      raise ConfigError(
        "ablation.prompts is empty; name JSONL files to judge drafters on"
      )
    sets = [PromptSet.read(p, config.eval.limit) for p in settings.prompts]
    names = [prompt_set.name for prompt_set in sets]
    if twice := _find_twice(names):
      raise ConfigError(
        f"ablation.prompts has two files called {twice!r}; rename one"
      )
    return cls(
      config=config,
      arms=arms,
      trials=_order(arms, settings.seeds, workdir),
      pairs=parse_pairs(settings.compare, [arm.name for arm in arms]),
      prompt_sets=sets,
      points=sweep.parse(config.eval.sweep, config.decode),
    )


def parse_arms(lines: Sequence[str], base: Config) -> list[Arm]:
  """The arms, each differing from base as its line says.

  Raises:
    ConfigError: by arm, for a name or a setting that makes no sense.
  """
  if not lines:
    raise ConfigError(f"ablation.arms is empty; give lines like {_EXAMPLE}")
  arms = [_parse_arm(line, base) for line in lines]
  if twice := _find_twice([arm.name for arm in arms]):
    raise ConfigError(f"arm {twice!r} is there twice; rename one")
  return arms


def _parse_arm(line: str, base: Config) -> Arm:
  name, colon, rest = line.partition(":")
  if not colon or not _NAME.fullmatch(name):
    raise ConfigError(
      f"ablation.arms: {line!r} has no name of letters, digits, _ and - "
      f"before a colon; write a line like {_EXAMPLE}"
    )
  try:
    settings = _split(rest)
    return Arm(name, settings, override(base, settings))
  except ConfigError as error:
    raise ConfigError(f"arm {name!r}: {error}") from error


def _split(text: str) -> dict[str, str]:
  """The fields and values of a line, which is split as by a shell."""
  try:
    words = shlex.split(text)
  except ValueError as error:
    raise ConfigError(f"cannot read {text.strip()!r}: {error}") from error
  settings: dict[str, str] = {}
  for word in words:
    name, equals, value = word.partition("=")
    if not equals:
      raise ConfigError(f"{word!r} is no field=value; see {_EXAMPLE}")
    if name in settings:
      raise ConfigError(f"{name} stands there twice; keep one")
    settings[name] = value
  return settings


def override(base: Config, settings: Mapping[str, str]) -> Config:
  """A copy of the config with these fields of drafter and train replaced.

  Raises:
    ConfigError: for a field that is none, may not change, or takes other
      values.
  """
  config = copy.deepcopy(base)
  for name, text in settings.items():
    section, dot, field = name.partition(".")
    if section not in SECTIONS or not dot or "." in field:
      raise ConfigError(
        f"{name!r} cannot differ between arms; only fields of "
        f"{' and '.join(SECTIONS)} can"
      )
    if name == "train.seed":
      raise ConfigError("train.seed is for ablation.seeds to say")
    config_file.check_overrides(config, [name])
    part = getattr(config, section)
    setattr(part, field, _read(type(getattr(part, field)), name, text))
  config_file.check_values(config)
  return config


def _read(kind: type, name: str, text: str) -> Any:
  """A value of its field's type."""
  if kind is str:
    return text
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = None
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise ConfigError(
      f"{name} takes values of type {kind.__name__}, not {text!r}"
    )
  return value


def _order(
  arms: Sequence[Arm], seeds: Sequence[int], workdir: pathlib.Path
) -> list[Trial]:
  """Stopped early, a grid has covered every arm before any twice."""
  trials = []
  for number, seed in enumerate(seeds):
    for arm in arms:
      if arm.is_trained:
        config = copy.deepcopy(arm.config)
        config.name = f"{config.name}/{arm.name}"
        config.train.seed = seed
        directory = workdir / arm.name / f"seed{seed}"
        trials.append(Trial(arm, seed, config, directory))
      elif number == 0:
        trials.append(Trial(arm, None, arm.config, workdir / arm.name))
  return trials


def parse_pairs(lines: Sequence[str], names: Sequence[str]) -> list[Pair]:
  """What to compare; without lines, every arm with the first.

  Raises:
    ConfigError: for a line that does not name two arms.
  """
  if not lines:
    return [Pair(name, names[0]) for name in names[1:]]
  pairs = []
  for line in lines:
    match = re.fullmatch(r"\s*(\S+)\s+vs\s+([^\s:]+)\s*(?::\s*(.*))?", line)
    if match is None:
      raise ConfigError(
        f"ablation.compare: cannot read {line!r}; write 'ARM vs ARM: note'"
      )
    for name in match.group(1, 2):
      if name not in names:
        raise ConfigError(
          f"ablation.compare, line {line!r}: there is no arm {name!r}; choose "
          f"from {', '.join(names)}"
        )
    pairs.append(Pair(match[1], match[2], match[3] or ""))
  return pairs


def _find_twice(names: Sequence[str]) -> str | None:
  """The first name that stands there twice."""
  return next((name for name in names if names.count(name) > 1), None)
