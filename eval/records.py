"""What an evaluation found: a record of all, and the JSON file of it."""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Sequence
from typing import Any

import jax

from dflash_jax.compare import Comparison
from dflash_jax.config import Config, ConfigError
from eval import acceptance, speed
from eval.prompt_sets import PromptSet
from eval.protocol import CONVENTIONS, PROTOCOL
from eval.replies import Replies, find_intervals
from eval.sweep import Result
from pallas_kernels.devices import known_cache_bytes

SWEEP_CONVENTIONS = {
  "points": "in the order of config.eval.sweep; decode is the point's own "
  "section of the config, and config.decode what it started from",
  "repeats": "every pass of a reply counts as a reply",
}


def to_record(
  config: Config,
  prompts: int,
  rule: str,
  comparisons: Sequence[Comparison],
  drafter_bytes: int = 0,
  prompt_set: PromptSet | None = None,
) -> dict[str, Any]:
  """Everything that a reader needs to trust or repeat the numbers.

  Args:
    config: of the run.
    prompts: how many.
    rule: of verification.
    comparisons: one per reply.
    drafter_bytes: of the drafter's weights; 0 for one without any.
    prompt_set: whose prompts they are, the replies in its order; with it the
      record has intervals, and every reply.
  """
  return {
    "prompts": prompts,
    "rule": rule,
    "drafter_bytes": drafter_bytes,
    **_measure(comparisons),
    **(_detail(prompt_set, comparisons) if prompt_set else {}),
    **circumstances(config),
    "conventions": CONVENTIONS,
    "protocol": PROTOCOL,
  }


def _detail(
  prompt_set: PromptSet, comparisons: Sequence[Comparison]
) -> dict[str, Any]:
  """What intervals and comparisons of two records are made of."""
  replies = Replies.of(prompt_set.prompts, comparisons)
  return {
    "prompt_set": prompt_set.describe(),
    "intervals": find_intervals(replies),
    "replies": replies.to_json(),
  }


def to_sweep_record(
  config: Config, prompts: int, results: Sequence[Result]
) -> dict[str, Any]:
  """As to_record, with the numbers of each point under "points"."""
  return {
    "prompts": prompts,
    "points": [_to_point(result) for result in results],
    **circumstances(config),
    "conventions": CONVENTIONS | SWEEP_CONVENTIONS,
  }


def _to_point(result: Result) -> dict[str, Any]:
  found: dict[str, Any] = {"refused": result.refusal}
  if not result.refusal:
    found = {"rule": result.rule, **_measure(result.comparisons)}
  point = result.point
  decode = dataclasses.asdict(point.decode)
  return {"line": point.line, "settings": point.settings, "decode": decode} | (
    found
  )


def _measure(comparisons: Sequence[Comparison]) -> dict[str, Any]:
  replies = [c.speculative for c in comparisons]
  found = acceptance.summarize(replies)
  verified = sum(reply.width * reply.rounds for reply in replies)
  return {
    "guarantee": comparisons[0].guarantee,
    "width": verified / max(found.rounds, 1),
    **dataclasses.asdict(found),
    **dataclasses.asdict(speed.summarize(comparisons)),
  }


def circumstances(config: Config) -> dict[str, Any]:
  """Of a measurement: the config, drafter, versions, machine and time."""
  return {
    "config": dataclasses.asdict(config),
    "drafter_digest": digest_files(config.drafter.path),
    "versions": _versions(),
    "machine": _machine(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def write_json(path: str, record: dict[str, Any]) -> None:
  """Writes the record, whole or not at all.

  Raises:
    ConfigError: the file cannot be written.
  """
  write_whole(path, to_json(record), "--json_out")


def digest_files(path: str) -> str:
  """Of a drafter's directory: another one under the same name is known by it.

  "" of what is no directory.
  """
  directory = pathlib.Path(path)
  if not directory.is_dir():
    return ""
  total = hashlib.sha256()
  for file in sorted(each for each in directory.iterdir() if each.is_file()):
    with file.open("rb") as content:
      total.update(file.name.encode() + b"\0")
      total.update(hashlib.file_digest(content, "sha256").digest())
  return total.hexdigest()[:16]


def to_json(record: dict[str, Any]) -> str:
  """As JSON; lists of numbers stand on one line each."""
  text = json.dumps(record, indent=2, allow_nan=False) + "\n"
  # A list without text, lists or objects: nothing inside a string matches, for
  # no string holds a line break.
  return re.sub(
    r"\[\n\s*([^][{}\"]*?)\s*\]",
    lambda match: f"[{' '.join(match[1].split())}]",
    text,
  )


def write_whole(path: str, text: str, flag: str) -> None:
  """Writes a file, whole or not at all; `flag` named it, for complaints."""
  file = pathlib.Path(path)
  partial = file.with_name(file.name + ".partial")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
  except OSError as error:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise ConfigError(
      f"cannot write {path}: {error.strerror}; choose another {flag}"
    ) from error


def _versions(
  packages: Sequence[str] = ("jax", "jaxlib", "flax", "transformers", "numpy"),
) -> dict[str, str]:
  found = {name: importlib.metadata.version(name) for name in packages}
  return {"python": platform.python_version(), **found}


def _machine() -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    "cpu": _cpu_model(),
    "cores": os.cpu_count(),
    "device": device.device_kind,
    "l2_bytes": known_cache_bytes(device.device_kind),
    "devices": jax.device_count(),
    "platform": device.platform,
  }


def _cpu_model() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2] for line in lines if "model name" in line]
  return names[0].strip() if names else platform.processor()
