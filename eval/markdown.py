"""The report's tables as Markdown, for a README."""

from collections.abc import Sequence

from eval.findings import tabulate
from eval.page import summarize
from eval.runs import Curve, Run
from eval.tables import Table


def to_markdown(runs: Sequence[Run], curves: Sequence[Curve]) -> str:
  """All tables; equal records give equal text."""
  parts = [
    "# Speculative decoding, measured",
    "Written by `python -m eval.report` from its records; not to be edited. "
    + _escape(summarize(runs, curves)),
    *map(_table, tabulate(runs, curves)),
    "docs/protocol.md says how it was measured, and what the numbers are.",
  ]
  return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
  marks = [
    ":---" if place < table.left else "---:" for place in range(len(table.head))
  ]
  lines = [
    "| " + " | ".join(cells) + " |"
    for cells in (
      [*map(_escape, table.head)],
      marks,
      *([*map(_escape, row)] for row in table.rows),
    )
  ]
  parts = [f"## {_escape(table.title)}", "\n".join(lines), _escape(table.note)]
  return "\n\n".join(part for part in parts if part)


def _escape(text: str) -> str:
  """Text that no cell ends in and no tag begins with."""
  for mark, safe in (
    ("&", "&amp;"),
    ("<", "&lt;"),
    ("|", "\\|"),
    ("`", "\\`"),
    ("[", "\\["),
  ):
    text = text.replace(mark, safe)
  return " ".join(text.split())
