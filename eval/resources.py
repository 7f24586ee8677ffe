"""What decoding takes, as tables of a report: time, memory, throughput."""

from collections.abc import Sequence
from typing import Any

from eval import pareto
from eval.protocol import PLAIN
from eval.runs import Curve, Run, name_all
from eval.tables import Table

PARTS = ("draft", "verify", "commit", "host")


def tabulate_rounds(runs: Sequence[Run]) -> Table:
  """Draft, verify, commit and host of a round."""
  rows = []
  for name, run, found in find_splits(runs):
    rows.append(
      [
        name,
        f"{run.temperature:g}",
        str(found["width"]),
        *(f"{found[f'{part}_ms']:.2f}" for part in PARTS),
        f"{found['whole_ms']:.2f}",
        f"{found['parts_over_whole']:.0%}",
      ]
    )
  return Table(
    "A round's time, ms",
    ["drafter", "T", "width", *PARTS, "whole", "parts / whole"],
    rows,
    note="Parts are jitted and timed one by one, and the whole inside the "
    "loop's dispatch: the last column says how well they add up.",
  )


def find_splits(
  runs: Sequence[Run],
) -> list[tuple[str, Run, dict[str, Any]]]:
  """Round-time splits: a drafter's once per temperature, plain's first."""
  found: dict[tuple[str, float], tuple[str, Run, dict[str, Any]]] = {}
  for run in sorted(runs, key=lambda run: run.temperature):
    for name, key in ((PLAIN, "plain_round_time"), (run.drafter, "round_time")):
      split = run.record.get(key)
      if isinstance(split, dict):
        found.setdefault((name, run.temperature), (name, run, split))
  return list(found.values())


def tabulate_memory(runs: Sequence[Run]) -> Table:
  """Bytes of parameters and caches."""
  names = (
    "target_bytes",
    "drafter_bytes",
    "trimmed_head_bytes",
    "target_cache_bytes",
    "drafter_cache_bytes",
    "peak_bytes",
  )
  found: dict[str, list[str]] = {}
  of = []
  for run in runs:
    memory = run.record.get("memory")
    if isinstance(memory, dict):
      cells = [f"{memory[name] / 2**20:,.1f}" for name in names]
      found.setdefault(run.drafter, [run.drafter, *cells])
      of.append(str(memory["peak_of"]))
  return Table(
    "Memory, MiB",
    [
      "drafter",
      "target",
      "drafter's own",
      "its trimmed head",
      "target's cache",
      "drafter's cache",
      "peak",
    ],
    list(found.values()),
    note=f"Peak: the most so far of {', '.join(name_all(of))}, all drafters "
    "and compiling included."
    if of
    else "",
  )


def tabulate_throughput(curve: Curve) -> Table:
  """Both ways at each concurrency, and ratios where plain decoding reaches."""
  base = curve.points[0]["mode"]
  plain = pareto.places(curve.points, base)
  rows = []
  for point in curve.points:
    place = point["user_tokens_per_s"], point["device_tokens_per_s"]
    ratio = pareto.ratio_at(plain, place)
    shown = f"{ratio:.2f}x" if ratio else f"{base} does not reach it"
    rows.append(
      [
        str(point["mode"]),
        str(point["concurrency"]),
        f"{place[0]:.1f}",
        f"{place[1]:.1f}",
        "" if point["mode"] == base else shown,
      ]
    )
  return Table(
    f"Throughput, {curve.drafter}, {curve.workflow}",
    [
      "mode",
      "in flight",
      "tokens/s per user",
      "tokens/s per device",
      "at this interactivity, over " + base,
    ],
    rows,
    note=f"The highest interactivity of {base} is {pareto.reach(plain):.1f} "
    "tokens/s per user; no ratio is quoted beyond it.",
  )
