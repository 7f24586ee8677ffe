"""Records that reports are made of, read back and checked."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from dflash_jax.config import ConfigError
from eval.replies import Replies

# Numbers that every record of plain against speculative decoding has.
NUMBERS = (
  "requests",
  "rounds",
  "tau_per_request",
  "tau_per_round",
  "plain_tokens_per_s",
  "speculative_tokens_per_s",
  "speedup",
  "identical_fraction",
)
_LISTS = ("acceptance_per_position", "conditional_acceptance", "histogram")
_CURVE = ("mode", "concurrency", "user_tokens_per_s", "device_tokens_per_s")
_REMEDY = "give files that eval.main, eval.suite or eval.agents wrote"


@dataclasses.dataclass(frozen=True)
class Run:
  """A drafter against plain decoding, on one prompt set at one temperature.

  Attributes:
    source: the file.
    drafter, prompts: names, for a reader.
    temperature: of the target.
    record: as written; older ones lack keys.
    replies: one by one; None of a record that has none.
  """

  source: str
  drafter: str
  prompts: str
  temperature: float
  record: dict[str, Any]
  replies: Replies | None

  @property
  def key(self) -> tuple[str, str, float]:
    """What tells it from others of a suite."""
    return self.prompts, self.drafter, self.temperature

  def interval(self, name: str) -> tuple[float, float] | None:
    """Of a number of the record; None where it has none."""
    found = (self.record.get("intervals") or {}).get(name)
    return (found[0], found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Curve:
  """Throughput against interactivity, measured on the engine.

  Attributes:
    source, drafter: as of a Run. workflow: of the requests.
    points: measurements of all modes, as eval.agents writes them.
    record: as written.
  """

  source: str
  drafter: str
  workflow: str
  points: list[dict[str, Any]]
  record: dict[str, Any]


def read(paths: Iterable[str]) -> tuple[list[Run], list[Curve]]:
  """All that files hold, and directories of such files.

  Raises:
    ConfigError: a file that is missing or no such record, by name.
  """
  runs: list[Run] = []
  curves: list[Curve] = []
  for file in _list_files(paths):
    record = _read_record(file)
    if "measurements" in record:
      curves += _to_curves(file, record)
    elif "points" in record:
      runs += _to_points(file, record)
    else:
      runs.append(_to_run(file, record, {}))
  return runs, curves


def _list_files(paths: Iterable[str]) -> list[pathlib.Path]:
  files: list[pathlib.Path] = []
  for path in map(pathlib.Path, paths):
    if path.is_dir():
      found = sorted(path.glob("*.json"))
      if not found:
        raise ConfigError(f"{path} holds no .json file; {_REMEDY}")
      files += found
    else:
      files.append(path)
  return list(dict.fromkeys(files))


def _read_record(file: pathlib.Path) -> dict[str, Any]:
  try:
    record = json.loads(file.read_text(encoding="utf-8"))
  except OSError as error:
    raise ConfigError(
      f"cannot read {file}: {error.strerror}; {_REMEDY}"
    ) from error
  except ValueError as error:
    raise ConfigError(f"{file} is not JSON ({error}); {_REMEDY}") from error
  if not isinstance(record, dict):
    raise ConfigError(f"{file} holds no JSON object; {_REMEDY}")
  return record


def _to_points(file: pathlib.Path, record: dict[str, Any]) -> list[Run]:
  """A sweep's points, each a run of the same drafter decoding otherwise."""
  points = _take(file, record, "points", list)
  return [
    _to_run(file, record | point, _take(file, point, "settings", dict))
    for point in points
    if isinstance(point, dict) and not point.get("refused")
  ]


def _to_run(
  file: pathlib.Path, record: dict[str, Any], settings: dict[str, Any]
) -> Run:
  for name in NUMBERS:
    if not _is_number(record.get(name)):
      raise _damaged(file, name, "a number")
  for name in _LISTS:
    values = record.get(name)
    if not isinstance(values, list) or not all(map(_is_number, values)):
      raise _damaged(file, name, "a list of numbers")
  config = _take(file, record, "config", dict)
  decode = record.get("decode") or config.get("decode") or {}
  temperature = decode.get("temperature", 0.0)
  path = str((config.get("drafter") or {}).get("path", "drafter"))
  name = str(record.get("drafter") or pathlib.PurePath(path).name)
  said = " ".join(f"{key}={value}" for key, value in settings.items())
  prompt_set = record.get("prompt_set") or {}
  return Run(
    source=str(file),
    drafter=" ".join(filter(None, (name, said))),
    prompts=str(prompt_set.get("name") or file.stem),
    temperature=float(temperature) if _is_number(temperature) else 0.0,
    record=record,
    replies=_read_replies(file, record),
  )


def _read_replies(file: pathlib.Path, record: dict[str, Any]) -> Replies | None:
  columns = record.get("replies")
  if columns is None:
    return None
  try:
    return Replies.from_json(columns)
  except (KeyError, TypeError, ValueError) as error:
    raise ConfigError(
      f"{file}: 'replies' are damaged ({error}); measure anew"
    ) from error


def _to_curves(file: pathlib.Path, record: dict[str, Any]) -> list[Curve]:
  points = _take(file, record, "measurements", list)
  for point in points:
    for name in _CURVE:
      if not isinstance(point, dict) or name not in point:
        raise _damaged(file, f"measurements.{name}", "a value")
      if name != "mode" and not _is_number(point[name]):
        raise _damaged(file, f"measurements.{name}", "a number")
  config = _take(file, record, "config", dict)
  path = str((config.get("drafter") or {}).get("path", "drafter"))
  drafter = str(record.get("drafter") or pathlib.PurePath(path).name)
  names = dict.fromkeys(str(point.get("workflow", "")) for point in points)
  return [
    Curve(
      source=str(file),
      drafter=drafter,
      workflow=name,
      points=[p for p in points if str(p.get("workflow", "")) == name],
      record=record,
    )
    for name in names
  ]


def _take(
  file: pathlib.Path, record: dict[str, Any], name: str, kind: type
) -> Any:
  value = record.get(name)
  if not isinstance(value, kind):
    raise _damaged(file, name, f"a {kind.__name__}")
  return value


def _damaged(file: pathlib.Path, name: str, kind: str) -> ConfigError:
  return ConfigError(f"{file}: {name!r} is not {kind}; {_REMEDY}")


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return is_number and math.isfinite(value)


def name_all(values: Sequence[str]) -> list[str]:
  """Each once, in order of first appearance."""
  return list(dict.fromkeys(values))
