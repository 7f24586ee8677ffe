"""Records of evaluations as PNG plots, for which matplotlib is needed."""

import importlib.metadata
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from dflash_jax.config import ConfigError
from eval.tables import show


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
    show(value)
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
