"""Plots of an ablation: accepted length by arm, and speed against it."""

import pathlib
from collections.abc import Sequence

import matplotlib.figure

from train.ablation.results import Record
from train.ablation.summary import Cell


def write(grid: Record, cells: Sequence[Cell], directory: pathlib.Path) -> None:
  """Draws tau.png and speed.png of the first way to decode."""
  point = grid["points"][0]
  shown = [cell for cell in cells if cell.point == point]
  order = [arm["name"] for arm in grid["arms"]]
  _draw_tau(shown, order, point).savefig(directory / "tau.png", dpi=110)
  _draw_speed(shown, order, point).savefig(directory / "speed.png", dpi=110)


def _draw_tau(
  cells: Sequence[Cell], order: Sequence[str], point: str
) -> matplotlib.figure.Figure:
  """A line per arm: a dot for each seed, a bar for their mean."""
  figure = matplotlib.figure.Figure(
    figsize=(7, 1.2 + 0.3 * len(order)), layout="constrained"
  )
  axes = figure.subplots()
  for number, prompts in enumerate(_prompt_sets(cells)):
    for place, arm in enumerate(order):
      for cell in cells:
        if (cell.arm, cell.prompts) != (arm, prompts):
          continue
        values = cell.tau.values
        axes.plot(
          values, [place] * len(values), "o", color=f"C{number}", alpha=0.5
        )
        axes.plot(cell.tau.mean, place, "|", color=f"C{number}", markersize=14)
    axes.plot([], [], "o", color=f"C{number}", label=prompts)
  axes.set(
    yticks=range(len(order)),
    yticklabels=order,
    xlabel="tau per reply, bonus included",
    title=f"a dot per seed; decoded with {point}",
  )
  axes.invert_yaxis()
  axes.grid(axis="x", alpha=0.3)
  axes.legend(fontsize=8)
  return figure


def _draw_speed(
  cells: Sequence[Cell], order: Sequence[str], point: str
) -> matplotlib.figure.Figure:
  """A marker per arm, with bars of one standard deviation over seeds."""
  figure = matplotlib.figure.Figure(figsize=(7, 5), layout="constrained")
  axes = figure.subplots()
  axes.axhline(1.0, color="grey", linestyle="--")
  for number, arm in enumerate(order):
    for cell in cells:
      if (cell.arm, cell.prompts) != (arm, ""):
        continue
      place = cell.tau.mean, cell.speedup.mean
      axes.errorbar(
        *place,
        xerr=cell.tau.deviation or 0.0,
        yerr=cell.speedup.deviation or 0.0,
        fmt="o",
        color=f"C{number % 10}",
        capsize=2,
      )
      axes.annotate(
        arm, place, xytext=(5, 3), textcoords="offset points", fontsize=7
      )
  axes.set(
    xlabel="tau per reply, bonus included",
    ylabel="speed-up over plain decoding",
    title=f"all prompts; decoded with {point}",
  )
  axes.margins(x=0.15)
  return figure


def _prompt_sets(cells: Sequence[Cell]) -> list[str]:
  return list(dict.fromkeys(cell.prompts for cell in cells if cell.prompts))
