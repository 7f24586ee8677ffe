"""The report as one HTML page that fetches nothing and runs nothing."""

import html
import json
from collections.abc import Sequence
from typing import Any

from eval import figures, pareto
from eval.figures import Mark, Row, Series
from eval.findings import tabulate
from eval.protocol import CONVENTIONS, PROTOCOL
from eval.resources import PARTS, find_splits
from eval.runs import Curve, Run, name_all
from eval.tables import Table

# The browser enforces it: no script, no request, whatever a name contains.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff;
  --faint: #d5dae0; --soft: #f4f6f8; --quiet: #57606a; --c0: #0072b2;
  --c1: #d55e00; --c2: #008a63; --c3: #aa4499; --c4: #8a6d00; --c5: #3d8fb8;
  --c6: #b2223c; --c7: #5b5f97 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117;
  --faint: #30363d; --soft: #161b22; --quiet: #9198a1; --c0: #58a6e0;
  --c1: #f28c45; --c2: #3ecf9f; --c3: #e08ad8; --c4: #d8b73a; --c5: #8fd0f0;
  --c6: #ff7b8d; --c7: #a5a9f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .2rem 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .4rem 0; max-width: 70ch }
.quiet, .note { color: var(--quiet); font-size: .875rem }
.scroll { overflow-x: auto; border: 1px solid var(--faint);
  border-radius: 6px }
table { border-collapse: collapse; font-size: .875rem; width: 100%;
  font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--faint) }
thead th { border-top: 0; background: var(--soft) }
.name { text-align: left }
.figures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
figure { margin: 0; padding: .6rem; border: 1px solid var(--faint);
  border-radius: 6px; min-width: 0; max-width: 30rem }
figcaption { font-weight: 600; font-size: .9rem }
svg { display: block; width: 100%; height: auto }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink) }
svg .strong { font-weight: 600 } svg .small { font-size: 10px }
.grid { stroke: var(--faint) } .line { fill: none; stroke-width: 1.8 }
.reference { stroke: var(--quiet); stroke-dasharray: 4 3 }
details { margin: .6rem 0 } summary { cursor: pointer; font-weight: 600 }
dt { font-weight: 600 } dd { margin: 0 0 .5rem 1rem }
pre { overflow-x: auto; background: var(--soft); padding: .6rem;
  font-size: .75rem; line-height: 1.4; border-radius: 6px;
  overflow-wrap: normal }
""" + "\n".join(
  f".c{n} {{ fill: var(--c{n}) }} .s{n} {{ stroke: var(--c{n}) }}"
  for n in range(8)
)


def to_html(runs: Sequence[Run], curves: Sequence[Curve]) -> str:
  """The page; equal records give equal pages."""
  both: list[Run | Curve] = [*runs, *curves]
  body = "\n".join(
    [
      "<h1>Speculative decoding, measured</h1>",
      f'<p class="quiet">{_escape(summarize(runs, curves))}</p>',
      '<div class="figures">',
      *(
        f"<figure><figcaption>{_escape(title)}</figcaption>\n{svg}</figure>"
        for title, svg in draw(runs, curves)
      ),
      "</div>",
      *map(_table, tabulate(runs, curves)),
      *_how(),
      *map(_origin, both),
    ]
  )
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    "<title>Speculative decoding, measured</title>\n"
    f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
    "</body>\n</html>\n"
  )


def summarize(runs: Sequence[Run], curves: Sequence[Curve]) -> str:
  """Target, machine, versions and dates, in a sentence or two."""
  both: list[Run | Curve] = [*runs, *curves]
  records = [each.record for each in both]
  targets = name_all([_target(record) for record in records])
  machines = name_all(
    [
      f"{machine.get('device')} on {machine.get('cpu')}, "
      f"{machine.get('cores')} cores, jax {record['versions'].get('jax')}"
      for record in records
      if (machine := record.get("machine")) and record.get("versions")
    ]
  )
  dates = sorted(str(record.get("date", ""))[:10] for record in records)
  days = " to ".join(name_all([dates[0], dates[-1]]))
  budgets = name_all(
    [
      str((record["config"].get("eval") or {}).get("max_new_tokens"))
      for record in records
    ]
  )
  return (
    f"Target {'; '.join(targets)}. Replies of up to {', '.join(budgets)} "
    f"tokens. {'; '.join(machines)}; {days}."
  )


def _target(record: dict[str, Any]) -> str:
  target = record["config"].get("target") or {}
  return f"{target.get('path') or 'random'}, {target.get('dtype')}"


# --- Figures ------------------------------------------------------------------


def draw(runs: Sequence[Run], curves: Sequence[Curve]) -> list[tuple[str, str]]:
  """(title, SVG) of each figure that these records give."""
  both: list[Run | Curve] = [*runs, *curves]
  drafters = name_all([each.drafter for each in both])
  colors = {name: number for number, name in enumerate(drafters)}
  found = []
  for temperature in sorted({run.temperature for run in runs}):
    mine = [run for run in runs if run.temperature == temperature]
    at = f"temperature {temperature:g}"
    for title, key, label, reference in (
      ("Accepted length", "tau_per_request", "tau, bonus included", 1.0),
      ("Speed-up over plain decoding", "speedup", "times", 1.0),
    ):
      rows = [
        Row(run.prompts, run.drafter, colors[run.drafter], _mark(run, key))
        for run in _by_prompts(mine)
      ]
      name = f"{title}, {at}"
      found.append((name, figures.dots(name, rows, label, reference=reference)))
    for prompts in name_all([run.prompts for run in mine]):
      few = [run for run in mine if run.prompts == prompts]
      found += _draw_acceptance(few, f"{prompts}, {at}", colors)
    found.append(_draw_tradeoff(mine, at, colors))
  return [*found, *_draw_splits(runs), *map(_draw_curve, curves)]


def _by_prompts(runs: Sequence[Run]) -> list[Run]:
  order = name_all([run.prompts for run in runs])
  return sorted(runs, key=lambda run: order.index(run.prompts))


def _mark(run: Run, key: str) -> Mark:
  low, high = run.interval(key) or (None, None)
  return Mark(run.record[key], low=low, high=high)


def _draw_acceptance(
  runs: Sequence[Run], where: str, colors: dict[str, int]
) -> list[tuple[str, str]]:
  """A line per drafter: rounds that accepted at least i drafts."""
  series = []
  for run in runs:
    shares = run.record["acceptance_per_position"]
    spans = (run.record.get("intervals") or {}).get("acceptance_per_position")
    bounds = [each or (None, None) for each in spans or [None] * len(shares)]
    marks = [
      Mark(place, share, low, high)
      for place, (share, (low, high)) in enumerate(
        zip(shares, bounds, strict=True), start=1
      )
    ]
    series.append(Series(run.drafter, colors[run.drafter], marks))
  if not any(each.marks for each in series):
    return []
  title = f"Acceptance by position, {where}"
  return [
    (
      title,
      figures.lines(
        title,
        series,
        "position i in the block",
        "rounds that accepted at least i",
        percent=True,
        whole=True,
      ),
    )
  ]


def _draw_tradeoff(
  runs: Sequence[Run], at: str, colors: dict[str, int]
) -> tuple[str, str]:
  """Speed-up against tau: what a drafter's own cost takes away."""
  series = [
    Series(
      name,
      colors[name],
      [
        Mark(r.record["tau_per_request"], r.record["speedup"])
        for r in runs
        if r.drafter == name
      ],
      is_line=False,
    )
    for name in name_all([run.drafter for run in runs])
  ]
  title = f"Speed-up against accepted length, {at}"
  svg = figures.lines(
    title, series, "tau, bonus included", "speed-up", reference=1.0
  )
  return title, svg


def _draw_splits(runs: Sequence[Run]) -> list[tuple[str, str]]:
  """A bar per drafter and temperature."""
  splits = find_splits(runs)
  if not splits:
    return []
  title = "Where a round's time goes"
  svg = figures.stacks(
    title,
    [f"{name}, T {run.temperature:g}" for name, run, _ in splits],
    PARTS,
    [[max(s[f"{part}_ms"], 0.0) for part in PARTS] for _, _, s in splits],
    "ms per round",
  )
  return [(title, svg)]


def _draw_curve(curve: Curve) -> tuple[str, str]:
  """A line per mode, a mark per number of requests in flight."""
  base = curve.points[0]["mode"]
  series = []
  for color, mode in enumerate(name_all([p["mode"] for p in curve.points])):
    mine = [point for point in curve.points if point["mode"] == mode]
    mine.sort(key=lambda point: point["concurrency"])
    marks = [
      Mark(user, device, label=str(point["concurrency"]))
      for point, (user, device) in zip(
        mine, pareto.places(curve.points, mode), strict=True
      )
    ]
    series.append(Series(mode, color, marks))
  title = f"Throughput against interactivity, {curve.drafter}, {curve.workflow}"
  limit = pareto.reach(pareto.places(curve.points, base))
  svg = figures.lines(
    title,
    series,
    f"tokens/s per user; {base} ends at {limit:.1f}",
    "tokens/s per device; numbers: in flight",
    boundary=limit,
  )
  return title, svg


# --- Text ---------------------------------------------------------------------


def _table(table: Table) -> str:
  def cells(row: Sequence[str], tag: str) -> str:
    return "".join(
      f"<{tag}{' class=name' if place < table.left else ''}>"
      f"{_escape(cell)}</{tag}>"
      for place, cell in enumerate(row)
    )

  head = f"<thead><tr>{cells(table.head, 'th')}</tr></thead>"
  rows = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
  note = f'\n<p class="note">{_escape(table.note)}</p>' if table.note else ""
  return (
    f"<h2>{_escape(table.title)}</h2>\n"
    f'<div class="scroll" tabindex="0" role="region" '
    f'aria-label="{_escape(table.title)}">\n<table>{head}\n'
    f"<tbody>{rows}</tbody></table></div>{note}"
  )


def _how() -> list[str]:
  """Protocol and conventions, spelled out."""
  return [
    "<h2>How it was measured</h2>",
    _definitions("Protocol", PROTOCOL),
    _definitions("Conventions", CONVENTIONS),
  ]


def _definitions(title: str, texts: dict[str, str]) -> str:
  items = "\n".join(
    f"<dt>{_escape(name)}</dt><dd>{_escape(text)}</dd>"
    for name, text in texts.items()
  )
  return f"<details><summary>{title}</summary>\n<dl>{items}</dl>\n</details>"


def _origin(each: Run | Curve) -> str:
  """Config, versions and machine of a record, folded."""
  names = ("date", "machine", "versions", "prompt_set", "interleaved", "config")
  kept = {name: each.record[name] for name in names if name in each.record}
  where = each.prompts if isinstance(each, Run) else each.workflow
  title = f"{where}, {each.drafter}"
  if isinstance(each, Run):
    title += f", temperature {each.temperature:g}"
  text = json.dumps(kept, indent=1, ensure_ascii=False)
  return (
    f"<details><summary>{_escape(title)}: config and machine</summary>\n"
    f"<pre>{_escape(text)}</pre>\n</details>"
  )


def _escape(text: str) -> str:
  return html.escape(text, quote=True)
