"""Figures as SVG text, drawn by hand: no library, no script, no font.

Marks differ in shape besides colour. Every mark is of class "mark" and tells
its numbers in a <title>.
"""

import dataclasses
import math
from collections.abc import Sequence

from eval import svg


@dataclasses.dataclass(frozen=True)
class Mark:
  """A value with its interval, if it has one.

  Attributes:
    x, y: where; of a row of dots only x counts.
    low, high: of the interval, along x of dots and along y of lines.
    label: written beside it.
  """

  x: float
  y: float = 0.0
  low: float | None = None
  high: float | None = None
  label: str = ""


@dataclasses.dataclass(frozen=True)
class Series:
  """Marks of one colour and shape.

  Attributes:
    name: in the legend.
    color: number of its class; equal names have equal ones in all figures.
    marks: in order. is_line: whether they are joined.
  """

  name: str
  color: int
  marks: list[Mark]
  is_line: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of `dots`: a mark and its names."""

  group: str
  name: str
  color: int
  mark: Mark


def dots(
  title: str,
  rows: Sequence[Row],
  label: str,
  *,
  reference: float | None = None,
) -> str:
  """Values side by side, rows under the heading of their group.

  Args:
    title: of the figure.
    rows: those of one group stand together.
    label: of the axis, which begins at 0 or below the least.
    reference: where a dashed line stands, such as break-even.
  """
  values = [v for row in rows for v in _extent(row.mark.x, row.mark)]
  values += [] if reference is None else [reference]
  ticks = svg.pick_ticks(min([0.0, *values]), max(values), 5)
  left = 104
  scale = svg.Scale(ticks[0], ticks[-1], left, svg.WIDTH - svg.RIGHT)
  parts, y, group = [], float(svg.TOP), None
  for row in rows:
    if row.group != group:
      y += 12 if group is None else 26
      group = row.group
      parts.append(svg.text(4, y, svg.cut(group, svg.WIDTH - 30), "strong"))
    y += 16
    parts.append(
      svg.text(left - 8, y + 4, svg.cut(row.name, left - 12), end="end")
    )
    parts.append(_bar(scale, row.mark, y, row.color))
    shown = f"{row.group}, {row.name}: {_say(row.mark.x, row.mark)}"
    parts.append(svg.shape(scale(row.mark.x), y, row.color, shown))
  bottom = y + 14
  frame = svg.x_axis(scale, ticks, svg.TOP, bottom, label)
  if reference is not None:
    frame.append(
      svg.dashed(scale(reference), svg.TOP, scale(reference), bottom)
    )
  return svg.wrap(title, bottom + 36, [*frame, *parts])


def lines(
  title: str,
  series: Sequence[Series],
  x_label: str,
  y_label: str,
  *,
  percent: bool = False,
  whole: bool = False,
  reference: float | None = None,
  boundary: float | None = None,
) -> str:
  """Series against two axes, with a legend below.

  Args:
    title, x_label, y_label: of the figure.
    series: at least one mark in all.
    percent: y runs from 0 to 1 and is shown in percent.
    whole: x takes whole numbers alone.
    reference: of y, where a dashed line stands.
    boundary: of x, likewise.
  """
  marks = [mark for each in series for mark in each.marks]
  ys = [value for mark in marks for value in _extent(mark.y, mark)]
  ys += [] if reference is None else [reference]
  xs = [mark.x for mark in marks]
  y_ticks = svg.pick_ticks(0.0, 1.0 if percent else max(ys), 5)
  x_ticks = svg.pick_ticks(min([0.0, *xs]), max(xs), 6)
  if whole:
    step = max(math.ceil(max(xs) / 8), 1)
    x_ticks = [float(n) for n in range(0, math.ceil(max(xs)) + step, step)]
  bottom = 210.0
  across = svg.Scale(x_ticks[0], x_ticks[-1], 46, svg.WIDTH - svg.RIGHT)
  up = svg.Scale(y_ticks[0], y_ticks[-1], bottom, svg.TOP + 14)
  parts = svg.x_axis(across, x_ticks, svg.TOP + 14, bottom, x_label)
  parts += svg.y_axis(up, y_ticks, across.end, y_label, percent)
  if reference is not None:
    parts.append(svg.dashed(46, up(reference), across.end, up(reference)))
  if boundary is not None:
    x = across(boundary)
    parts.append(svg.dashed(x, svg.TOP + 14, x, bottom))
  for each in series:
    parts += _draw_series(each, across, up)
  legend, height = _legend(series, bottom + 44)
  return svg.wrap(title, height, [*parts, *legend])


def stacks(
  title: str,
  names: Sequence[str],
  parts: Sequence[str],
  values: Sequence[Sequence[float]],
  label: str,
) -> str:
  """A bar per name, made of its parts side by side, with a legend below.

  Args:
    title, label: of the figure and its axis.
    names: of the bars. parts: of which each is made.
    values: of each bar's parts, none negative.
  """
  left = 104
  ticks = svg.pick_ticks(0.0, max(sum(each) for each in values), 5)
  scale = svg.Scale(ticks[0], ticks[-1], left, svg.WIDTH - svg.RIGHT)
  drawn, y = [], float(svg.TOP)
  for name, bar in zip(names, values, strict=True):
    y += 4
    drawn.append(
      svg.text(left - 8, y + 13, svg.cut(name, left - 12), end="end")
    )
    begun = 0.0
    for color, (part, value) in enumerate(zip(parts, bar, strict=True)):
      x, width = scale(begun), scale(begun + value) - scale(begun)
      drawn.append(
        f'<rect class="mark c{color}" x="{svg.place(x)}" y="{svg.place(y)}" '
        f'width="{svg.place(max(width, 0.3))}" height="18">'
        f"<title>{svg.escape(f'{name}, {part}: {value:.2f}')}</title></rect>"
      )
      begun += value
    y += 20
  axis = svg.x_axis(scale, ticks, svg.TOP, y + 6, label)
  named = [Series(part, color, []) for color, part in enumerate(parts)]
  legend, height = _legend(named, y + 50, square=True)
  return svg.wrap(title, height, [*axis, *drawn, *legend])


# --- Parts --------------------------------------------------------------------


def _draw_series(series: Series, across: svg.Scale, up: svg.Scale) -> list[str]:
  parts = []
  places = [(across(mark.x), up(mark.y)) for mark in series.marks]
  if series.is_line and len(places) > 1:
    path = " ".join(f"{svg.place(x)},{svg.place(y)}" for x, y in places)
    parts.append(
      f'<polyline class="line s{series.color % svg.COLORS}" points="{path}"/>'
    )
  for mark, (x, y) in zip(series.marks, places, strict=True):
    if mark.low is not None and mark.high is not None:
      parts.append(svg.stroke(x, up(mark.low), x, up(mark.high), series.color))
    shown = f"{series.name}: {mark.x:g}, {_say(mark.y, mark)}"
    parts.append(svg.shape(x, y, series.color, shown))
    if mark.label:
      # Beside the mark, on the side that has room.
      wide = svg.LETTER * len(mark.label) + 8
      at, end = (x + 7, "start") if x + wide < svg.WIDTH else (x - 7, "end")
      parts.append(svg.text(at, y - 5, mark.label, "small", end=end))
  return parts


def _legend(
  series: Sequence[Series], top: float, *, square: bool = False
) -> tuple[list[str], float]:
  """Names with their marks, as many in a line as fit; and where it ends."""
  parts, x, y = [], 10.0, top
  for each in series:
    name = svg.cut(each.name, svg.WIDTH - 40)
    wide = 24 + svg.LETTER * len(name)
    if x + wide > svg.WIDTH and x > 10:
      x, y = 10.0, y + 17
    if square:
      parts.append(
        f'<rect class="c{each.color % svg.COLORS}" x="{svg.place(x - 4)}" '
        f'y="{svg.place(y - 8)}" width="9" height="9"/>'
      )
    else:
      parts.append(svg.shape(x, y - 4, each.color, each.name, "key"))
    parts.append(svg.text(x + 9, y, name))
    x += wide
  return parts, y + 10


def _bar(scale: svg.Scale, mark: Mark, y: float, color: int) -> str:
  """The interval of a mark, along x."""
  if mark.low is None or mark.high is None:
    return ""
  return svg.stroke(scale(mark.low), y, scale(mark.high), y, color)


def _extent(value: float, mark: Mark) -> list[float]:
  return [value, *(each for each in (mark.low, mark.high) if each is not None)]


def _say(value: float, mark: Mark) -> str:
  if mark.low is None or mark.high is None:
    return f"{value:.3g}"
  return f"{value:.3g}, 95% from {mark.low:.3g} to {mark.high:.3g}"
