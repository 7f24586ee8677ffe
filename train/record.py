"""What a run leaves beside its checkpoints.

config.json      the whole Config it was started with
run.json         what that came to: corpus, drafter, draft vocabulary
metrics.jsonl    one JSON object a line, as training goes
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from dflash_jax.config import Config, to_json
from dflash_jax.config_json import from_json
from train.design import Network
from train.files import FileError, cannot_write, make_directory, write_whole

CONFIG, _RUN, _METRICS = "config.json", "run.json", "metrics.jsonl"

# Fields of TrainConfig that change no update, but for the order of sums.
_FREE = frozenset(
  {
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "evaluate_sequences",
    "keep_checkpoints",
    "data",
    "fsdp",
    "decode_every",
    "decode_prompts",
    "decode_tokens",
    "trackers",
  }
)


@dataclasses.dataclass(frozen=True)
class Run:
  """What a config came to; fixed for the life of a run.

  Attributes:
    corpus: its checksum.
    drafter: the architecture.
    draft_vocabulary: ids that the draft head keeps, or None for all.
  """

  corpus: str
  drafter: Network
  draft_vocabulary: tuple[int, ...] | None


def write_run(workdir: str, config: Config, run: Run) -> None:
  """Writes config.json and run.json.

  Raises:
    FileError: when the disk refuses.
  """
  directory = make_directory(workdir)
  write_whole(directory / CONFIG, to_json(config).encode())
  write_whole(directory / _RUN, to_json(run).encode())


def read_config(workdir: str | os.PathLike[str]) -> Config:
  """The config that a run was started with.

  Raises:
    FileError: if the workdir has none.
    ConfigError: if it is not one.
  """
  return from_json(Config, *_read_text(workdir, CONFIG))


def read_run(workdir: str | os.PathLike[str]) -> Run:
  """What that config came to; errors as in `read_config`."""
  return from_json(Run, *_read_text(workdir, _RUN))


def check_same_config(workdir: str, config: Config) -> None:
  """Refuses to resume what would be another run, naming the fields.

  Raises:
    FileError: if settings that shape the drafter have changed.
  """
  earlier = read_config(workdir)
  changes = []
  for section in ("target", "drafter", "train"):
    old = dataclasses.asdict(getattr(earlier, section))
    new = dataclasses.asdict(getattr(config, section))
    for name in old:
      is_free = section == "train" and name in _FREE
      if old[name] != new[name] and not is_free:
        changes.append(f"{section}.{name}={old[name]!r}, not {new[name]!r}")
  if changes:
    raise FileError(
      f"{workdir} was begun with {'; '.join(changes)}; resume with the same "
      "config or choose another --workdir"
    )


def check_same_run(workdir: str, run: Run) -> None:
  """Refuses to resume on other data.

  Raises:
    FileError: if the corpus has changed since the run was begun.
  """
  if read_run(workdir) != run:
    raise FileError(
      f"{workdir} was begun on another corpus (see its {_RUN}); bring that "
      "back or choose another --workdir"
    )


class MetricsLog:
  """metrics.jsonl, never ahead of the checkpoint.

  Resuming drops the lines past the restored step, and one that was cut short,
  so that the file reads as one run.
  """

  def __init__(self, workdir: str, step: int):
    """Opens workdir/metrics.jsonl, keeping what happened up to `step`.

    Raises:
      FileError: when the disk refuses.
    """
    self._path = make_directory(workdir) / _METRICS
    text = self._path.read_text() if self._path.exists() else ""
    whole = text.split("\n")[:-1]
    kept = [line for line in whole if json.loads(line)["step"] <= step]
    write_whole(self._path, "".join(f"{line}\n" for line in kept).encode())

  def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """Appends a record.

    Raises:
      FileError: when the disk refuses.
    """
    record = {"kind": kind, "step": step, **values}
    try:
      with self._path.open("a") as file:
        file.write(json.dumps(record) + "\n")
    except OSError as error:
      raise cannot_write(self._path, error) from error

  def close(self) -> None:
    """Every line is on the disk already."""


def _read_text(workdir: str | os.PathLike[str], name: str) -> tuple[str, str]:
  """The text of a file of the run, and where it came from."""
  path = pathlib.Path(workdir) / name
  if not path.is_file():
    raise FileError(
      f"{path} is missing; give the --workdir of a train.main run"
    )
  return path.read_text(encoding="utf-8"), str(path)
