"""What a report says, as tables: the same for HTML and Markdown."""

from collections.abc import Sequence
from typing import Any

from dflash_jax.verify import GUARANTEES
from eval import resources
from eval.protocol import PLAIN, TIE
from eval.runs import Curve, Run, name_all
from eval.tables import Table

_PROMISES = {"tokens": "tokens", "law": "law", "none": "LOSSY"}


def tabulate(runs: Sequence[Run], curves: Sequence[Curve]) -> list[Table]:
  """All tables that these records give; none is empty."""
  temperatures = sorted({run.temperature for run in runs})
  found = [
    *(
      _side_by_side([r for r in runs if r.temperature == each], each)
      for each in temperatures
    ),
    _acceptance(runs),
    _categories(runs),
    _accuracy(runs),
    _ladder(runs),
    resources.tabulate_rounds(runs),
    resources.tabulate_memory(runs),
    *map(resources.tabulate_throughput, curves),
  ]
  return [table for table in found if table.rows]


def _side_by_side(runs: Sequence[Run], temperature: float) -> Table:
  """A row per prompt set and drafter, plain decoding first."""
  rows, shown = [], set()
  for prompts in name_all([run.prompts for run in runs]):
    for run in (run for run in runs if run.prompts == prompts):
      # Drafters of a suite share one; each other record has its own.
      if (plain := (prompts, _rate(run, "plain"))) not in shown:
        shown.add(plain)
        rows.append([prompts, PLAIN, "1.00", "1.00", plain[1], "1.00x", "", ""])
      rows.append(
        [
          prompts,
          run.drafter,
          _cell(run, "tau_per_request"),
          f"{run.record['tau_per_round']:.2f}",
          _rate(run, "speculative"),
          _cell(run, "speedup", "{:.2f}", "x"),
          f"{run.record['identical_fraction']:.1%}",
          _PROMISES.get(str(run.record.get("guarantee")), "?"),
        ]
      )
  promises = name_all([str(run.record.get("guarantee")) for run in runs])
  return Table(
    f"Side by side, temperature {temperature:g}",
    [
      "prompts",
      "drafter",
      "tau, per reply",
      "tau, per round",
      "tokens/s",
      "speed-up",
      "identical",
      "promise",
    ],
    rows,
    left=2,
    note="Brackets: 95% intervals over prompts. tau counts the bonus token. "
    "Speed-up is over plain decoding of the same prompt, prefill apart. "
    + " ".join(
      f"{_PROMISES[key]}: {GUARANTEES[key].removeprefix('LOSSY: ')}."
      for key in promises
      if key in GUARANTEES
    ),
  )


def _acceptance(runs: Sequence[Run]) -> Table:
  """Acceptance by position, unconditional and given the one before."""
  depth = max(
    (len(run.record["acceptance_per_position"]) for run in runs), default=0
  )
  rows = []
  for run in runs:
    shares = run.record["acceptance_per_position"]
    given = run.record["conditional_acceptance"]
    cells = [
      f"{share:.0%} ({base:.0%})"
      for share, base in zip(shares, given, strict=False)
    ]
    cells += [""] * (depth - len(cells))
    rows.append([run.prompts, run.drafter, f"{run.temperature:g}", *cells])
  return Table(
    "Acceptance by position",
    ["prompts", "drafter", "T", *(str(i) for i in range(1, depth + 1))],
    rows if depth else [],
    left=2,
    note="Rounds with at least i accepted drafts / rounds; in brackets, given "
    "that i - 1 were.",
  )


def _categories(runs: Sequence[Run]) -> Table:
  """tau and speed-up of a benchmark's parts, where a record has them."""
  rows = [
    [
      run.prompts,
      str(name),
      run.drafter,
      f"{run.temperature:g}",
      str(part.get("replies", "")),
      _number(part.get("tau_per_request"), "{:.2f}"),
      _number(part.get("speedup"), "{:.2f}x"),
    ]
    for run in runs
    for name, part in (run.record.get("by_category") or {}).items()
    if isinstance(part, dict)
  ]
  return Table(
    "By category",
    ["prompts", "category", "drafter", "T", "replies", "tau", "speed-up"],
    rows,
    left=3,
  )


def _accuracy(runs: Sequence[Run]) -> Table:
  """Answers that are right, both ways, where a record has them."""
  rows, notes = [], []
  for run in runs:
    found = run.record.get("accuracy")
    if not isinstance(found, dict):
      continue
    interval = found.get("interval")
    shown = ""
    if isinstance(interval, list) and len(interval) == 2:
      shown = " to ".join(_number(each, "{:+.1%}") for each in interval)
    rows.append(
      [
        run.prompts,
        run.drafter,
        f"{run.temperature:g}",
        str(found.get("n", "")),
        _number(found.get("plain"), "{:.1%}"),
        _number(found.get("speculative"), "{:.1%}"),
        shown,
      ]
    )
    notes.append(str(found.get("how", "")))
  return Table(
    "Task accuracy",
    [
      "prompts",
      "drafter",
      "T",
      "answers",
      "plain",
      "speculative",
      "95% of the difference",
    ],
    rows,
    left=2,
    note=" ".join(name_all([note for note in notes if note])),
  )


def _ladder(runs: Sequence[Run]) -> Table:
  """Identity, ties, rescoring."""
  rows = []
  for run in runs:
    found = run.record.get("ladder")
    if not isinstance(found, dict):
      continue
    differences = found.get("differences") or []
    ties = sum(bool(each["tie"]) for each in differences)
    gaps = [each["gap"] for each in differences]
    rescored = found.get("rescored_tokens")
    rows.append(
      [
        run.prompts,
        run.drafter,
        f"{run.temperature:g}",
        str(found["dtype"]),
        f"{found['identical']} of {found['replies']}",
        f"{ties} of {len(gaps)}" if gaps else "-",
        f"{max(gaps):.2g}" if gaps else "-",
        f"{found['agreed_tokens']:,} of {rescored:,}" if rescored else "-",
      ]
    )
  return Table(
    "Losslessness",
    [
      "prompts",
      "drafter",
      "T",
      "dtype",
      "identical replies",
      "ties among the rest",
      "largest gap",
      "tokens confirmed",
    ],
    rows,
    left=2,
    note=f"A tie: two logits within {TIE:g} where a reply first differs. "
    "Confirmed: the target, reading the reply again in the shapes that "
    "verified it, chooses the same token.",
  )


# --- Cells --------------------------------------------------------------------


def _cell(run: Run, name: str, form: str = "{:.2f}", unit: str = "") -> str:
  """A number with its interval, if it has one."""
  text = form.format(run.record[name]) + unit
  if (interval := run.interval(name)) is None:
    return text
  low, high = (form.format(each) for each in interval)
  return f"{text} [{low}, {high}]"


def _rate(run: Run, way: str) -> str:
  return _cell(run, f"{way}_tokens_per_s", "{:.1f}")


def _number(value: Any, form: str) -> str:
  return form.format(value) if isinstance(value, int | float) else ""
