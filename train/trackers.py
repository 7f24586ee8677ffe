"""Where the numbers of a run go: JSON lines always, others when asked.

    metrics.jsonl      always, see train/record.py
    tensorboard/       train.trackers=("tensorboard",): event files
    Weights & Biases   train.trackers=("wandb",): a run of the project
                       `dflash_jax`

A value by slot of a block becomes one curve per slot, and text stays text.
"""

import contextlib
import dataclasses
import importlib
import pathlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

from dflash_jax.config import Config, ConfigError
from train.files import make_directory, write_whole
from train.processes import is_first
from train.record import MetricsLog

# The package that each tracker needs.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
PROJECT = "dflash_jax"
_RUN_ID = "wandb.txt"


class Tracker(Protocol):
  """Takes the records of a run as they are made."""

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """Adds a record.

    Args:
      kind: of it: "train", "held_out" or "decode".
      step: updates done.
      values: numbers, lists of numbers by slot, texts.
    """

  def close(self) -> None:
    """Sends what is left."""


def check_trackers(names: Sequence[str]) -> None:
  """Refuses, before the long work, what cannot be opened.

  Raises:
    ConfigError: for an unknown tracker, or one whose package is missing.
  """
  for name in names:
    if name not in PACKAGES:
      known = " or ".join(map(repr, PACKAGES))
      raise ConfigError(
        f"train.trackers: {name!r} is unknown; choose {known}, or () for "
        "metrics.jsonl alone"
      )
    _import(name)


@contextlib.contextmanager
def open_trackers(config: Config, workdir: str, step: int) -> Iterator[Tracker]:
  """Everything that config.train.trackers asks for, and metrics.jsonl.

  Of many processes the first alone writes.

  Args:
    config: of the run.
    workdir: of the run.
    step: at which it starts or resumes; what was logged later is dropped.

  Raises:
    ConfigError: as check_trackers.
    FileError: when the disk refuses.
  """
  if not is_first():
    yield _All(())
    return
  openers: dict[str, Callable[[Config, str, int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
  }
  with contextlib.ExitStack() as stack:
    trackers: list[Tracker] = [MetricsLog(workdir, step)]
    for name in dict.fromkeys(config.train.trackers):
      tracker = openers[name](config, workdir, step)
      stack.callback(tracker.close)
      trackers.append(tracker)
    yield _All(trackers)


def flatten(kind: str, values: dict[str, Any]) -> dict[str, Any]:
  """Values by one name each: "train/loss", "train/accuracy/1" (a slot's)."""
  flat = {}
  for name, value in values.items():
    if isinstance(value, list):
      for slot, item in enumerate(value, start=1):
        flat[f"{kind}/{name}/{slot}"] = item
    else:
      flat[f"{kind}/{name}"] = value
  return flat


@dataclasses.dataclass(frozen=True)
class _All:
  """Several trackers as one."""

  trackers: Sequence[Tracker]

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    for tracker in self.trackers:
      tracker.write(kind, step, values)

  def close(self) -> None:
    for tracker in self.trackers:
      tracker.close()


class _TensorBoard:
  """Event files; those of a resumed run hide what came after its step."""

  def __init__(self, config: Config, workdir: str, step: int):
    directory = make_directory(pathlib.Path(workdir) / "tensorboard")
    self._writer = _import("tensorboard").SummaryWriter(
      logdir=str(directory), purge_step=step + 1 if step else None
    )

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    for name, value in flatten(kind, values).items():
      is_text = isinstance(value, str)
      add = self._writer.add_text if is_text else self._writer.add_scalar
      add(name, value, step)
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class _WeightsAndBiases:
  """A run of Weights & Biases, continued under its id when resumed.

  The service keeps what it has of a step: lines that a resumed run writes again
  are dropped there.
  """

  def __init__(self, config: Config, workdir: str, step: int):
    path = make_directory(workdir) / _RUN_ID
    if not step or not path.exists():
      write_whole(path, secrets.token_hex(8).encode())
    self._run = _import("wandb").init(
      project=PROJECT,
      name=config.name or None,
      id=path.read_text(),
      resume="allow",
      dir=str(path.parent),
      config=dataclasses.asdict(config),
    )

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    self._run.log(flatten(kind, values), step=step)

  def close(self) -> None:
    self._run.finish()


def _import(name: str) -> ModuleType:
  try:
    return importlib.import_module(PACKAGES[name])
  except ImportError as error:
    raise ConfigError(
      f"train.trackers asks for {name!r}, whose package is missing ({error}); "
      f"run: pip install {PACKAGES[name]}"
    ) from error
