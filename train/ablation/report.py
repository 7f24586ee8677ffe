"""The report of an ablation, made of its results alone: Markdown and plots."""

import pathlib
from collections.abc import Sequence
from typing import Any

from dflash_jax.config import ConfigError
from dflash_jax.verify import GUARANTEES
from eval.bootstrap import COVERAGE, Interval
from train.ablation.comparison import Difference, Spread, compare
from train.ablation.results import FILE, Record, Results
from train.ablation.summary import Cell, summarize
from train.files import make_directory, write_whole


def write_report(results: Results, path: pathlib.Path) -> None:
  """Writes the Markdown file, and its plots into a directory beside it.

  Raises:
    ConfigError: if there is nothing to report yet, or no matplotlib.
    FileError: when the disk refuses.
  """
  grid = results.grid
  if grid is None or not results.of_kind("reply"):
    raise ConfigError(
      f"there are no results to report yet (no replies in {FILE}); let "
      "train.ablate run"
    )
  from train.ablation import plots  # needs matplotlib, which is optional

  cells = summarize(results)
  text = to_markdown(results, cells, path.stem)
  plots.write(grid, cells, make_directory(path.with_suffix("")))
  write_whole(path, text.encode())


def to_markdown(results: Results, cells: Sequence[Cell], name: str) -> str:
  """The report; plots are where `write_report` puts them."""
  grid = results.grid
  assert grid is not None
  parts = [
    "# Ablation",
    f"Written by `{grid['command']}` from its results; not to be edited.",
    _circumstances(grid),
    _arms(grid, results),
    *(_point(grid, cells, point) for point in grid["points"]),
    f"![accepted length]({name}/tau.png)\n\n![speed]({name}/speed.png)",
    *(_pairs(grid, results, point) for point in grid["points"]),
    _reading(results),
  ]
  return "\n\n".join(part for part in parts if part) + "\n"


# --- What was done ------------------------------------------------------------


def _circumstances(grid: Record) -> str:
  training, judged = grid["training"], grid["judged"]
  machine = grid["machine"]
  sets = ", ".join(
    f"{each['count']} of `{name}`" for name, each in judged["prompts"].items()
  )
  return (
    f"Target {grid['target']}. Every run: {training['steps']} steps of "
    f"{training['batch_size']} sequences, {training['num_anchors']} anchors "
    f"each, from {training['sequences']:,} sequences of "
    f"{training['tokens']:,} tokens, unless the arm says otherwise. Judged on "
    f"{sets}, {judged['max_new_tokens']} new tokens each, batch "
    f"{judged['batch_size']}, plain decoding and all drafters of a seed "
    f"interleaved in one process. {machine['device']} on {machine['cpu']}, "
    f"{machine['cores']} cores; jax {grid['versions']['jax']}; "
    f"{grid['date']}."
  )


def _arms(grid: Record, results: Results) -> str:
  """A row per arm: what it is, what it cost."""
  rows = []
  for arm in grid["arms"]:
    mine = [r for r in results.of_kind("trial") if r["arm"] == arm["name"]]
    seeds = len({record["seed"] for record in mine})
    # The newest record of each seed.
    newest = list({record["seed"]: record for record in mine}.values())
    differs = " ".join(f"{k}={v}" for k, v in arm["settings"].items())
    rows.append(
      [
        arm["name"],
        f"`{differs}`" if differs else "the base",
        f"{arm['parameters'] / 1e6:.2f}",
        str(seeds or "-"),
        _spread([r["step_seconds"] for r in newest], "{:.2f}"),
        _spread([r["tau"] for r in newest], "{:.3f}"),
      ]
    )
  table = _table(
    ["arm", "differs by", "M parameters", "seeds", "s per step", "walked tau"],
    rows,
    left=2,
  )
  trained = {(r["arm"], r["seed"]) for r in results.of_kind("trial")}
  failures = [
    f"* {r['arm']}, seed {r['seed']}, failed: {r['why']}"
    for r in results.of_kind("failure")
    if (r["arm"], r["seed"]) not in trained
  ]
  return "\n\n".join(["## Arms", table, *failures])


# --- What was found -----------------------------------------------------------


def _point(grid: Record, cells: Sequence[Cell], point: str) -> str:
  """A row per arm: accepted length by prompts, and speed over all."""
  sets = list(grid["judged"]["prompts"])
  rows = []
  for arm in grid["arms"]:
    mine = {
      cell.prompts: cell
      for cell in cells
      if (cell.arm, cell.point) == (arm["name"], point)
    }
    if not mine:
      continue
    whole = mine[""]
    rows.append(
      [
        arm["name"],
        *(_show(mine[name].tau) if name in mine else "-" for name in sets),
        _show(whole.tau),
        _show(whole.tokens_per_s, "{:.1f}"),
        _show(whole.speedup) + "x",
        _show(whole.round_ms, "{:.1f}"),
        f"{whole.identical:.0%}",
      ]
    )
  if not rows:
    return ""
  head = ["arm", *(f"tau, {name}" for name in sets), "tau", "tokens/s"]
  head += ["speed-up", "ms per round", "identical"]
  return f"## Decoded with {point}\n\n{_table(head, rows)}"


def _pairs(grid: Record, results: Results, point: str) -> str:
  """A row per pair: differences with their intervals."""
  rows = []
  for pair in grid["pairs"]:
    found = compare(
      _replies(results, pair["arm"], point),
      _replies(results, pair["base"], point),
    )
    if found:
      rows.append(_pair_row(pair, found))
  if not rows:
    return ""
  head = ["", "tau", "", "interval", "tokens/s", "interval", "seeds", "replies"]
  has_notes = any(pair["note"] for pair in grid["pairs"])
  head += ["note"] if has_notes else []
  rows = [row if has_notes else row[:-1] for row in rows]
  return f"## Side by side, {point}\n\n{_table(head, rows)}"


def _pair_row(pair: dict[str, str], found: Difference) -> list[str]:
  return [
    f"{pair['arm']} vs {pair['base']}",
    _mark(f"{found.tau.value:+.3f}", found.tau, 0.0),
    f"{found.share:+.1%}",
    f"{found.tau.low:+.3f} to {found.tau.high:+.3f}",
    _mark(f"{found.speed.value:.3f}x", found.speed, 1.0),
    f"{found.speed.low:.3f}x to {found.speed.high:.3f}x",
    str(found.seeds),
    str(found.replies),
    pair["note"],
  ]


def _mark(text: str, interval: Interval, nothing: float) -> str:
  """Bold where the interval tells it from no difference."""
  return f"**{text}**" if interval.excludes(nothing) else text


def _reading(results: Results) -> str:
  """How to read the tables, and what was refused."""
  replies, refusals = results.of_kind("reply"), results.of_kind("refusal")
  greedy = [r for r in replies if r["guarantee"] == "tokens"]
  same = sum(r["identical"] for r in greedy)
  lines = [
    "## How to read this",
    "",
    "* tau: tokens emitted per target pass after prefill, the bonus token "
    "included, mean over replies; walked tau: of held-out answers, replayed at "
    "the end of training, all drafts of a block verified.",
    "* Numbers are means over seeds, ± their standard deviation. Tokens/s and "
    "speed-up are medians over replies, against plain decoding of the same "
    "prompt moments before; ms per round are of drafting, verification and "
    "commit together: at one width, arms differ by what drafting costs.",
    "* s per step is of one run among those that share the machine.",
    f"* Side by side: mean difference over the same prompts and seeds; ratio "
    f"of tokens/s, geometric mean. Intervals cover {COVERAGE:.0%}, seeds and "
    "prompts drawn anew together (pigeonhole bootstrap); bold where they "
    "exclude no difference. Of a single seed they know nothing of others.",
    f"* {same:,} of {len(greedy):,} replies are promised to be plain "
    "decoding's own and are"
    + (
      "."
      if same == len(greedy)
      else f"; {len(greedy) - same:,} ARE NOT, which is a bug or the rounding "
      "of a precision below float32."
    ),
  ]
  kinds = dict.fromkeys(r["guarantee"] for r in replies)
  lines += [f"* {kind}: {GUARANTEES[kind]}." for kind in kinds]
  refused = {(r["arm"], r["point"]): r["why"] for r in refusals}
  lines += [
    f"* {arm} cannot decode with {point}: {why}"
    for (arm, point), why in refused.items()
  ]
  return "\n".join(lines)


def _replies(results: Results, arm: str, point: str) -> list[Record]:
  return [
    record
    for record in results.of_kind("reply")
    if (record["arm"], record["point"]) == (arm, point)
  ]


# --- Tables -------------------------------------------------------------------


def _show(spread: Spread, form: str = "{:.2f}") -> str:
  text = form.format(spread.mean)
  if spread.deviation is None:
    return text
  return f"{text} ± {form.format(spread.deviation)}"


def _spread(values: Sequence[float | None], form: str) -> str:
  """As `_show`; a value of None was too short a run to say."""
  known = [value for value in values if value is not None]
  return _show(Spread.of(known), form) if known else "-"


def _table(
  head: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1
) -> str:
  """A Markdown table; columns after the first `left` are right-aligned."""
  marks = ["---" if i < left else "---:" for i in range(len(head))]
  cells = [head, marks, *rows]
  return "\n".join(
    "| " + " | ".join(str(c).replace("|", "\\|") for c in row) + " |"
    for row in cells
  )
