"""What an evaluation found: a table, a JSON file, a plot."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax

from dflash_jax.config import Config, ConfigError
from eval.acceptance import Acceptance
from eval.speed import Speed

CONVENTIONS = {
  "tau": "tokens emitted per target pass after prefill, bonus token included",
  "tau_per_request": "mean over replies of each reply's tau",
  "tau_per_round": "tokens of all replies / rounds of all replies",
  "acceptance_per_position": "rounds with >= i accepted drafts / rounds",
  "conditional_acceptance": "rounds with >= i / rounds with >= i - 1",
  "histogram": "rounds by number of drafts accepted, before budget or stop",
  "tokens_per_s": "median over replies, per request, first token excluded",
  "speedup": "median over replies of plain / speculative time per token",
}


def to_record(
  config: Config, prompts: int, acceptance: Acceptance, speed: Speed
) -> dict[str, Any]:
  """Everything that a reader needs to trust or repeat the numbers."""
  return {
    "prompts": prompts,
    **dataclasses.asdict(acceptance),
    **dataclasses.asdict(speed),
    "config": dataclasses.asdict(config),
    "versions": _versions(),
    "machine": _machine(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "conventions": CONVENTIONS,
  }


def to_table(record: dict[str, Any]) -> str:
  """The record's main numbers, for a screen."""
  machine = record["machine"]
  rows = [
    ("prompts, replies", f"{record['prompts']}, {record['requests']}"),
    ("tau per request, bonus included", f"{record['tau_per_request']:.3f}"),
    ("tau per round, bonus included", f"{record['tau_per_round']:.3f}"),
    ("plain tokens/s", f"{record['plain_tokens_per_s']:.1f}"),
    ("speculative tokens/s", f"{record['speculative_tokens_per_s']:.1f}"),
    ("speed-up", f"{record['speedup']:.2f}x"),
    ("identical replies", f"{record['identical_fraction']:.1%}"),
  ]
  lines = [f"{name:34}{value:>10}" for name, value in rows]
  lines.append(
    f"\n{'drafts':>8}{'rounds':>9}{'accepted >= i':>15}{'given i-1':>11}"
  )
  shares = [1.0, *record["acceptance_per_position"]]
  conditional = [1.0, *record["conditional_acceptance"]]
  counts = zip(record["histogram"], shares, conditional, strict=True)
  for drafts, (rounds, share, given) in enumerate(counts):
    lines.append(f"{drafts:>8}{rounds:>9}{share:>15.1%}{given:>11.1%}")
  lines.append(
    f"\n{machine['device']} on {machine['cpu']}, {machine['cores']} cores; "
    f"jax {record['versions']['jax']}; {record['date']}"
  )
  return "\n".join(lines)


def write_json(path: str, record: dict[str, Any]) -> None:
  """Writes the record, whole or not at all.

  Raises:
    ConfigError: the file cannot be written.
  """
  file = pathlib.Path(path)
  partial = file.with_name(file.name + ".partial")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
  except OSError as error:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise ConfigError(
      f"cannot write {path}: {error.strerror}; choose another --json_out"
    ) from error


def check_plot(path: str) -> None:
  """Raises ConfigError if a plot could not be drawn, before hours are spent."""
  if pathlib.Path(path).suffix != ".png":
    raise ConfigError(f"--plot_out={path} must end in .png")
  try:
    importlib.metadata.version("matplotlib")
  except importlib.metadata.PackageNotFoundError as error:
    raise ConfigError(
      "--plot_out needs matplotlib; pip install 'dflash-jax[eval]'"
    ) from error


def write_plot(path: str, record: dict[str, Any]) -> None:
  """Draws acceptance by position as a PNG."""
  import matplotlib.figure  # optional: only plots need it

  positions = range(1, len(record["acceptance_per_position"]) + 1)
  figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
  axes = figure.subplots()
  axes.bar(
    positions,
    record["acceptance_per_position"],
    color="tab:blue",
    label="rounds with at least i accepted",
  )
  axes.plot(
    positions,
    record["conditional_acceptance"],
    color="tab:orange",
    marker="o",
    label="given that i - 1 were",
  )
  axes.set(
    xlabel="position i in the block",
    ylabel="acceptance",
    ylim=(0, 1),
    xticks=list(positions),
    title=f"tau {record['tau_per_round']:.2f} per round, bonus included",
  )
  axes.legend()
  try:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
  except OSError as error:
    raise ConfigError(
      f"cannot write {path}: {error.strerror}; choose another --plot_out"
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
    "devices": jax.device_count(),
    "platform": device.platform,
  }


def _cpu_model() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2] for line in lines if "model name" in line]
  return names[0].strip() if names else platform.processor()
