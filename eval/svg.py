"""The parts that figures are made of: axes, marks, text, as SVG.

A figure is WIDTH units wide, about a phone's window, so that its letters are
readable there. Colours are classes c0 to c7 (fills) and s0 to s7 (strokes) of
the page.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

WIDTH = 360
RIGHT, TOP = 14, 10  # margins
COLORS = 8
LETTER = 6.9  # width, in units, of a wide font


@dataclasses.dataclass(frozen=True)
class Scale:
  """From values to units.

  Attributes:
    low, high: of the values. start, end: where they are drawn.
  """

  low: float
  high: float
  start: float
  end: float

  def __call__(self, value: float) -> float:
    share = (value - self.low) / (self.high - self.low)
    return self.start + share * (self.end - self.start)


def pick_ticks(low: float, high: float, count: int) -> list[float]:
  """Round numbers that enclose low and high, about `count` steps apart."""
  span = max(high - low, 1e-9)
  rough = span / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [n * step for n in range(first, max(last, first + 1) + 1)]


def wrap(title: str, height: float, parts: Sequence[str]) -> str:
  """A figure of these parts, as wide as its page lets it be."""
  body = "\n".join(parts)
  return (
    f'<svg viewBox="0 0 {WIDTH} {place(height)}" role="img" '
    f'xmlns="http://www.w3.org/2000/svg" aria-label="{escape(title)}">\n'
    f"<title>{escape(title)}</title>\n{body}\n</svg>"
  )


def x_axis(
  scale: Scale, ticks: Sequence[float], top: float, bottom: float, label: str
) -> list[str]:
  """Upright grid lines, their numbers, and what is measured along them."""
  parts = []
  for tick in ticks:
    x = place(scale(tick))
    parts.append(
      f'<line class="grid" x1="{x}" y1="{place(top)}" x2="{x}" '
      f'y2="{place(bottom)}"/>'
    )
    parts.append(text(scale(tick), bottom + 13, f"{tick:g}", end="middle"))
  middle = (scale.start + scale.end) / 2
  return [*parts, text(middle, bottom + 29, label, end="middle")]


def y_axis(
  scale: Scale, ticks: Sequence[float], right: float, label: str, percent: bool
) -> list[str]:
  """Level grid lines, their numbers, and what is measured across them."""
  parts = [text(4, TOP + 2, label)]
  for tick in ticks:
    y = place(scale(tick))
    parts.append(
      f'<line class="grid" x1="46" y1="{y}" x2="{place(right)}" y2="{y}"/>'
    )
    shown = f"{tick:.0%}" if percent else f"{tick:g}"
    parts.append(text(41, scale(tick) + 4, shown, end="end"))
  return parts


def shape(
  x: float, y: float, color: int, title: str, kind: str = "mark"
) -> str:
  """A mark: circle, square, diamond or triangle, by its colour's number."""
  paths = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "M-3.5 -3.5h7v7h-7z",
    "M0 -5L5 0L0 5L-5 0z",
    "M0 -5L5 4H-5z",
  )
  return (
    f'<path class="{kind} c{color % COLORS}" '
    f'transform="translate({place(x)} {place(y)})" '
    f'd="{paths[color % len(paths)]}">'
    f"<title>{escape(title)}</title></path>"
  )


def stroke(x1: float, y1: float, x2: float, y2: float, color: int) -> str:
  """A line between two marks."""
  return (
    f'<line class="line s{color % COLORS}" x1="{place(x1)}" y1="{place(y1)}" '
    f'x2="{place(x2)}" y2="{place(y2)}"/>'
  )


def dashed(x1: float, y1: float, x2: float, y2: float) -> str:
  """A line to compare with, such as no speed-up."""
  return (
    f'<line class="reference" x1="{place(x1)}" y1="{place(y1)}" '
    f'x2="{place(x2)}" y2="{place(y2)}"/>'
  )


def text(
  x: float, y: float, text: str, kind: str = "", *, end: str = "start"
) -> str:
  """Letters from a point, to it ("end") or around it ("middle")."""
  named = f' class="{kind}"' if kind else ""
  return (
    f'<text{named} x="{place(x)}" y="{place(y)}" text-anchor="{end}">'
    f"{escape(text)}</text>"
  )


def cut(text: str, room: float) -> str:
  """As much of a text as has room."""
  count = int(room / LETTER)
  return text if len(text) <= count else text[: count - 1] + "…"


def escape(text: str) -> str:
  """Text that no browser takes for markup."""
  return html.escape(text, quote=True)


def place(value: float) -> str:
  """A coordinate.

  Raises:
    ValueError: it is none, and the mark would vanish.
  """
  if not math.isfinite(value):
    raise ValueError(f"{value} is no place in a figure")
  return f"{value:.2f}".rstrip("0").rstrip(".")
