"""Records of evaluations as tables: for a screen, and as cells for reports."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dflash_jax.verify import GUARANTEES

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


@dataclasses.dataclass(frozen=True)
class Table:
  """Text cells under headings.

  Attributes:
    title: of the section.
    head, rows: cells, not yet escaped.
    left: columns, from the first, that are names; the rest are numbers.
    note: below it.
  """

  title: str
  head: list[str]
  rows: list[list[str]]
  left: int = 1
  note: str = ""


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
    [head, *([show(p["decode"][name]) for name in names] for p in points)]
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


def show(value: Any) -> str:
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
