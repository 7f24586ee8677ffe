"""What an ablation does before its first run: build, refuse, cache, claim."""

import collections
import dataclasses
import functools
import pathlib

import jax

from dflash_jax.config import ConfigError, DraftConfig, to_json
from dflash_jax.model import Model, load
from dflash_jax.target import Params
from dflash_jax.weights import WeightsError
from train.ablation.grid import Arm, Grid
from train.corpus import Corpus
from train.feature_cache import FeatureCache
from train.files import FileError, make_directory, write_whole
from train.record import CONFIG, check_same_config
from train.settings import check_settings
from train.setup import open_cache, plan_trainer
from train.step import Trainer


def load_base(grid: Grid) -> Model:
  """The target of all arms, without a drafter."""
  return load(dataclasses.replace(grid.config, drafter=DraftConfig()))


def check_arms(grid: Grid, base: Model) -> dict[str, int]:
  """Builds every arm's drafter, objective and step as far as that costs little.

  Returns:
    Parameters of each arm's drafter, its own alone, by name.

  Raises:
    ConfigError: for an arm that cannot be built, or whose run was begun with
      another config; by its name.
  """
  parameters = {}
  for arm in grid.arms:
    try:
      count = _count_trained if arm.is_trained else _count_loaded
      parameters[arm.name] = count(arm, base)
      for trial in grid.trials:
        if trial.arm is arm and (trial.workdir / CONFIG).exists():
          check_same_config(str(trial.workdir), trial.config)
    except (ConfigError, FileError, WeightsError) as error:
      raise ConfigError(f"arm {arm.name!r}: {error}") from error
  return parameters


def _count_loaded(arm: Arm, base: Model) -> int:
  drafter = base.with_drafter(arm.config.drafter).params.drafter
  return sum(leaf.size for leaf in jax.tree.leaves(drafter))


def _count_trained(arm: Arm, base: Model) -> int:
  check_settings(arm.config.train)
  trainer = _plan(arm, base)
  columns = arm.config.drafter.draft_vocabulary or None
  if columns:
    vocab_size = base.target.config.vocab_size
    read_corpus(arm.config.train.corpus).frequent_tokens(columns, vocab_size)
  init = functools.partial(trainer.learner.init, columns=columns)
  tree = jax.eval_shape(init, jax.random.key(0))
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _plan(arm: Arm, base: Model) -> Trainer:
  corpus = read_corpus(arm.config.train.corpus)
  return plan_trainer(arm.config, base.target, corpus)


@functools.lru_cache(maxsize=4)
def read_corpus(directories: tuple[str, ...]) -> Corpus:
  """A corpus, read once for all arms that share it."""
  return Corpus(directories)


def build_features(grid: Grid, base: Model) -> None:
  """Completes the feature caches of all arms, one per directory.

  A cache holds every layer that one of its arms reads: arms of different taps
  and losses share it. It is complete before the first run, and none writes.

  Raises:
    ConfigError: for an arm whose cache is of something else, by its name.
    FileError: when the disk refuses.
  """
  sharing: dict[str, list[tuple[Arm, tuple[int, ...]]]] = (
    collections.defaultdict(list)
  )
  for arm in grid.arms:
    directory = arm.config.train.feature_cache
    if arm.is_trained and directory and (read := _plan(arm, base).layers_read):
      sharing[directory].append((arm, read))
  for members in sharing.values():
    first, _ = members[0]
    dtype = first.config.train.compute_dtype
    params = jax.tree.map(
      lambda x, dtype=dtype: x.astype(dtype) if x.ndim > 1 else x,
      base.params.target,
    )
    union = tuple(sorted({layer for _, read in members for layer in read}))
    _open(first, base, params, union).build(base.target, params)
    for arm, read in members:
      _open(arm, base, params, read)


def _open(
  arm: Arm, base: Model, params: Params, layers: tuple[int, ...]
) -> FeatureCache:
  """The arm's cache of the layers; params are the target's, in its dtype."""
  corpus = read_corpus(arm.config.train.corpus)
  try:
    return open_cache(arm.config, corpus, base.target, params, layers)
  except FileError as error:
    raise ConfigError(f"arm {arm.name!r}: {error}") from error


def claim(grid: Grid, workdir: pathlib.Path) -> None:
  """Makes a directory this grid's, or sees that it is.

  Arms and seeds may come and go; what all arms share may not.

  Raises:
    FileError: if it holds another grid, by the fields that differ.
  """
  path = make_directory(workdir) / CONFIG
  if path.exists():
    check_same_config(str(workdir), grid.config)
  write_whole(path, to_json(grid.config).encode())
