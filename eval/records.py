"""What an evaluation found: a record of all, a table, a JSON file, a plot."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax

from dflash_jax.compare import Comparison
from dflash_jax.config import Config, ConfigError
from dflash_jax.verify import GUARANTEES
from eval import acceptance, speed
from eval.sweep import Result
from pallas_kernels.devices import known_cache_bytes

CONVENTIONS = {
  "tau": "tokens emitted per target pass after prefill, bonus token included",
  "tau_per_request": "mean over replies of each reply's tau",
  "tau_per_round": "tokens of all replies / rounds of all replies",
  "acceptance_per_position": "rounds with >= i accepted drafts / rounds",
  "conditional_acceptance": "rounds with >= i / rounds with >= i - 1",
  "histogram": "rounds by number of drafts accepted, 0..D, before budget or "
  "stop; D is the most that a round can accept: the block's drafts, or fewer "
  "where fewer nodes are verified",
  "width": "drafted nodes verified per round, mean over the rounds of all "
  "replies",
  "guarantee": "; ".join(f"{key}: {text}" for key, text in GUARANTEES.items()),
  "drafter_bytes": "own weights: 8-bit kernels, else config.target.dtype",
  "tokens_per_s": "median over replies, per request, first token excluded",
  "speedup": "median over replies of plain / speculative time per token",
}
SWEEP_CONVENTIONS = {
  "points": "in the order of config.eval.sweep; decode is the point's own "
  "section of the config, and config.decode what it started from",
  "repeats": "every pass of a reply counts as a reply",
}
# Headings of a sweep's table.
AXES = {
  "temperature": "temp",
  "draft_temperature": "draft temp",
  "draft_top_k": "draft top_k",
  "block_size": "block",
  "tree_nodes": "tree",
}
OUTPUTS = {"tokens": "tokens", "law": "law", "none": "LOSSY"}
# Columns of that table: a point's key, its heading and format.
FIGURES = (
  ("tau_per_request", "tau/reply", "{:.2f}"),
  ("tau_per_round", "tau/round", "{:.2f}"),
  ("width", "verified", "{:.1f}"),
  ("plain_tokens_per_s", "plain tok/s", "{:.1f}"),
  ("speculative_tokens_per_s", "spec tok/s", "{:.1f}"),
  ("speedup", "speed-up", "{:.2f}x"),
  ("identical_fraction", "identical", "{:.1%}"),
)


def to_record(
  config: Config,
  prompts: int,
  rule: str,
  comparisons: Sequence[Comparison],
  drafter_bytes: int = 0,
) -> dict[str, Any]:
  """Everything that a reader needs to trust or repeat the numbers.

  Args:
    config: of the run.
    prompts: how many.
    rule: of verification.
    comparisons: one per reply.
    drafter_bytes: of the drafter's weights; 0 for one without any.
  """
  return {
    "prompts": prompts,
    "rule": rule,
    "drafter_bytes": drafter_bytes,
    **_measure(comparisons),
    **circumstances(config),
    "conventions": CONVENTIONS,
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
  """Of a measurement: the config, versions, machine and time."""
  return {
    "config": dataclasses.asdict(config),
    "versions": _versions(),
    "machine": _machine(),
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
  }


def to_table(record: dict[str, Any]) -> str:
  """The record's main numbers, for a screen."""
  rows = [
    ("prompts, replies", f"{record['prompts']}, {record['requests']}"),
    ("tau per request, bonus included", f"{record['tau_per_request']:.3f}"),
    ("tau per round, bonus included", f"{record['tau_per_round']:.3f}"),
    ("plain tokens/s", f"{record['plain_tokens_per_s']:.1f}"),
    ("speculative tokens/s", f"{record['speculative_tokens_per_s']:.1f}"),
    ("speed-up", f"{record['speedup']:.2f}x"),
    ("identical replies", f"{record['identical_fraction']:.1%}"),
    ("drafts verified per round", f"{record['width']:.2f}"),
    ("rule", record["rule"]),
    ("guarantee", GUARANTEES[record["guarantee"]]),
    ("drafter's weights", f"{record['drafter_bytes'] / 2**20:.1f} MiB"),
  ]
  if cache := record["machine"]["l2_bytes"]:
    rows.append(("the device's L2 cache", f"{cache / 2**20:.1f} MiB"))
  lines = [f"{name:34}{value:>10}" for name, value in rows]
  lines.append(
    f"\n{'drafts':>8}{'rounds':>9}{'accepted >= i':>15}{'given i-1':>11}"
  )
  shares = [1.0, *record["acceptance_per_position"]]
  conditional = [1.0, *record["conditional_acceptance"]]
  counts = zip(record["histogram"], shares, conditional, strict=True)
  for drafts, (rounds, share, given) in enumerate(counts):
    lines.append(f"{drafts:>8}{rounds:>9}{share:>15.1%}{given:>11.1%}")
  return "\n".join([*lines, "", footer(record)])


def to_sweep_table(record: dict[str, Any]) -> str:
  """A row per point, in order; marks the best speed-up that is not lossy."""
  points = record["points"]
  names = list(dict.fromkeys(name for p in points for name in p["settings"]))
  measured = [point for point in points if "refused" not in point]
  lossless = [point for point in measured if point["guarantee"] != "none"]
  best = max(lossless, key=lambda point: point["speedup"], default=None)
  head = [AXES.get(name, name) for name in names]
  settings = align(
    [head, *([_show(p["decode"][name]) for name in names] for p in points)]
  )
  head = [*(heading for _, heading, _ in FIGURES), "output", ""]
  figures = iter(align([head, *(_figures(p, p is best) for p in measured)]))
  lines = [f"{settings[0]}  {next(figures)}".rstrip()]
  for point, row in zip(points, settings[1:], strict=True):
    refusal = point.get("refused")
    rest = f"refused: {refusal}" if refusal else next(figures)
    lines.append(f"{row}  {rest}".rstrip())
  lines.append("\n-: the default. *: the best speed-up that is not lossy.")
  for key in dict.fromkeys(point["guarantee"] for point in measured):
    lines.append(f"{OUTPUTS[key]}: {GUARANTEES[key].removeprefix('LOSSY: ')}.")
  return "\n".join([*lines, f"{record['prompts']} prompts; {footer(record)}"])


def _figures(point: dict[str, Any], is_best: bool) -> list[str]:
  """The cells of FIGURES, the guarantee, and a mark."""
  cells = [form.format(point[key]) for key, _, form in FIGURES]
  return [*cells, OUTPUTS[point["guarantee"]], "*" if is_best else ""]


def _show(value: Any) -> str:
  """A setting; 0 and "" stand for a default, except a temperature of 0.0."""
  if isinstance(value, float):
    return f"{value:g}"
  return str(value or "-")


def align(rows: Sequence[Sequence[str]]) -> list[str]:
  """Rows as lines, columns right-aligned and two spaces apart."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(f"{cell:>{n}}" for cell, n in zip(row, widths, strict=True))
    for row in rows
  ]


def footer(record: dict[str, Any]) -> str:
  """Machine, version and time of a record, on a line."""
  machine = record["machine"]
  return (
    f"{machine['device']} on {machine['cpu']}, {machine['cores']} cores; "
    f"jax {record['versions']['jax']}; {record['date']}"
  )


def write_json(path: str, record: dict[str, Any]) -> None:
  """Writes the record, whole or not at all.

  Raises:
    ConfigError: the file cannot be written.
  """
  write_whole(path, json.dumps(record, indent=2) + "\n", "--json_out")


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
  save_plot(figure, path)


def write_sweep_plot(path: str, record: dict[str, Any]) -> None:
  """Draws speed-up against tau as a PNG: a marker a point, a colour a line."""
  import matplotlib.figure  # optional: only plots need it

  figure = matplotlib.figure.Figure(figsize=(9, 6), layout="constrained")
  axes = figure.subplots()
  axes.axhline(1.0, color="grey", linestyle="--", label="break-even")
  lines = itertools.groupby(record["points"], key=lambda point: point["line"])
  for number, (line, members) in enumerate(lines):
    points = list(members)
    measured = [point for point in points if "refused" not in point]
    for index, point in enumerate(measured):
      is_lossy = point["guarantee"] == "none"
      place = point["tau_per_request"], point["speedup"]
      axes.scatter(
        *place,
        color=f"C{number}",
        marker="X" if is_lossy else "o",
        label=None if index else line,
      )
      axes.annotate(
        _name(point, points) + (" LOSSY" if is_lossy else ""),
        place,
        xytext=(5, 3),
        textcoords="offset points",
        fontsize=7,
      )
  axes.set(
    xlabel="tau per request, bonus included",
    ylabel="speed-up over plain decoding",
    title=f"{record['prompts']} prompts, {record['machine']['device']}",
  )
  axes.margins(x=0.15)  # room for the names
  figure.legend(loc="outside lower center", fontsize=7)
  save_plot(figure, path)


def _name(point: dict[str, Any], line: Sequence[dict[str, Any]]) -> str:
  """What tells a point from the others of its line."""
  return " ".join(
    _show(value)
    for name, value in point["settings"].items()
    if len(line) == 1 or any(p["settings"][name] != value for p in line)
  )


def save_plot(figure: Any, path: str) -> None:
  """Writes a matplotlib figure where --plot_out says."""
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
    "l2_bytes": known_cache_bytes(device.device_kind),
    "devices": jax.device_count(),
    "platform": device.platform,
  }


def _cpu_model() -> str:
  info = pathlib.Path("/proc/cpuinfo")
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.partition(":")[2] for line in lines if "model name" in line]
  return names[0].strip() if names else platform.processor()
