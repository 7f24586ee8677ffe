"""What eval.agents found: numbers, a table, a plot, a report."""

import itertools
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from dflash_jax.config import Config, ConfigError
from eval.closed_loop import Run
from eval.plots import save_plot
from eval.records import circumstances, write_whole
from eval.tables import align, footer
from eval.workload import Measurement

CONVENTIONS = {
  "chain_s": "seconds from a chain's start until its last request's result is "
  "told, of all in the order of their numbers; waiting for a row included",
  "speedup": "median over chains of the first mode's seconds / this mode's, of "
  "the same chain",
  "ttft_s": "of a request, from submission to its first token",
  "itl_s": "seconds before each token after a request's first; tokens of one "
  "dispatch come together, so most are 0",
  "burst_s": "seconds before each dispatch that brought tokens, the first of a "
  "request excluded",
  "user_tokens_per_s": "mean over requests of tokens after the first per "
  "second, for requests of more than one burst",
  "device_tokens_per_s": "tokens of all requests / seconds with chains in "
  "flight",
  "hit_rate": "hit_tokens / prompt_tokens: the share of prompt tokens found in "
  "shared pages and not read. Pages are empty at a mode's first chain of a "
  "measurement, and stay from then on",
  "tau": "tokens after the first / target passes after prefill, of all "
  "requests; bonus token included",
  "width": "drafted nodes verified per target pass",
  "peak_bytes": "of rows and pages; parameters come on top",
  "idle_share": "of the seconds with chains in flight, in which the device "
  "waited for the host to queue more work",
  "identical_replies": "share of requests whose tokens are those of the first "
  "mode, of those that had the same prompt there",
  "identical_chains": "share of chains all of whose replies are the first "
  "mode's; one tie of two logits that falls otherwise changes all that follows",
  "compiled": "programs compiled while chains were in flight; none if all was "
  "warm",
}
# Columns of the tables: heading, and how a measurement shows there.
_COLUMNS = (
  ("flight", "{concurrency}"),
  ("mode", "{mode}"),
  ("chains", "{chains}"),
  ("chain s", "{chain_s[p50]:.2f}/{chain_s[p95]:.2f}"),
  ("speed-up", "{speedup:.2f}x"),
  ("TTFT s", "{ttft_s[p50]:.2f}/{ttft_s[p95]:.2f}"),
  ("ITL ms", "{itl_ms[p50]:.0f}/{itl_ms[p99]:.0f}"),
  ("burst ms", "{burst_ms[p50]:.0f}/{burst_ms[p99]:.0f}"),
  ("user", "{user_tokens_per_s:.1f}"),
  ("device", "{device_tokens_per_s:.1f}"),
  ("hits", "{hit_rate:.0%}"),
  ("not read", "{hit_tokens}"),
  ("tau", "{tau:.2f}"),
  ("width", "{width:.1f}"),
  ("MiB", "{peak_mib:.0f}"),
  ("idle", "{idle_share:.1%}"),
  ("same", "{identical_replies:.1%}/{identical_chains:.0%}"),
)
_LEGEND = (
  "flight: chains in flight. Chains and TTFT: p50/p95; ITL and bursts: "
  "p50/p99. user, device: tokens/s. hits: prompt tokens found, not read. MiB: "
  "rows and pages, at most. idle: the device waits. same: replies/chains that "
  "are the first mode's."
)


# --- Numbers ------------------------------------------------------------------


def summarize(measurement: Measurement) -> list[dict[str, Any]]:
  """The numbers of each mode; CONVENTIONS says what they are."""
  base = next(iter(measurement.runs.values()))
  return [
    {
      "workflow": measurement.workflow.name,
      "concurrency": measurement.concurrency,
      "mode": mode,
      "chains": len(run.seconds),
      "requests": len(run.replies),
      **_times(run, base),
      **_work(run),
      **_identity(run, base),
    }
    for mode, run in measurement.runs.items()
  ]


def _times(run: Run, base: Run) -> dict[str, Any]:
  """How long chains and requests took."""
  results = [reply.result for reply in run.replies.values()]
  seconds = [run.seconds[number] for number in sorted(run.seconds)]
  ratios = [base.seconds[n] / run.seconds[n] for n in run.seconds]
  gaps = [gap for result in results for gap in result.itl_s]
  bursts = [
    after - before
    for result in results
    for (before, _), (after, _) in itertools.pairwise(result.arrivals)
  ]
  rates = [r.tokens_per_s for r in results if len(r.arrivals) > 1]
  return {
    "chain_s": _percentiles(seconds, 50, 95) | {"all": seconds},
    "speedup": float(np.median(ratios)),
    "ttft_s": _percentiles([result.ttft_s for result in results], 50, 95),
    "itl_s": _percentiles(gaps, 50, 99),
    "burst_s": _percentiles(bursts, 50, 99),
    "user_tokens_per_s": float(np.mean(rates)) if rates else 0.0,
    "wall_s": run.wall_s,
    "idle_share": run.idle_s / run.wall_s,
    "compiled": run.compiled,
  }


def _work(run: Run) -> dict[str, Any]:
  """What was read, drafted and emitted."""
  results = [reply.result for reply in run.replies.values()]
  tokens = sum(len(result.tokens) for result in results)
  prompt = sum(result.prompt_tokens for result in results)
  hit = sum(result.hit_tokens for result in results)
  rounds = sum(result.rounds for result in results)
  later = sum(len(result.tokens) - 1 for result in results if result.rounds)
  verified = sum(result.width * result.rounds for result in results)
  return {
    "tokens": tokens,
    "device_tokens_per_s": tokens / run.wall_s,
    "prompt_tokens": prompt,
    "hit_tokens": hit,
    "hit_rate": hit / prompt,
    "tau": later / max(rounds, 1),
    "width": verified / max(rounds, 1),
    "peak_bytes": run.peak_bytes,
  }


def _identity(run: Run, base: Run) -> dict[str, Any]:
  """How much of what was said is what the first mode said."""
  same_prompt = {
    key: reply
    for key, reply in run.replies.items()
    if base.replies[key].prompt == reply.prompt
  }
  same = {
    key
    for key, reply in same_prompt.items()
    if base.replies[key].result.tokens == reply.result.tokens
  }
  broken = {number for number, *_ in run.replies.keys() - same}
  return {
    "identical_replies": len(same) / max(len(same_prompt), 1),
    "identical_chains": 1 - len(broken) / len(run.seconds),
  }


def _percentiles(values: Sequence[float], *ranks: int) -> dict[str, float]:
  """By "p50" and so on; zeros if there are no values."""
  found = np.percentile(values, ranks) if values else np.zeros(len(ranks))
  return {f"p{n}": float(x) for n, x in zip(ranks, found, strict=True)}


def to_record(
  config: Config, sizes: dict[str, Any], measurements: list[dict[str, Any]]
) -> dict[str, Any]:
  """Everything that a reader needs to trust or repeat the numbers.

  Args:
    config: of the run.
    sizes: of Workload.describe.
    measurements: of `summarize`, as far as they have come.
  """
  return {
    **sizes,
    "measurements": measurements,
    **circumstances(config),
    "conventions": CONVENTIONS,
  }


# --- Text ---------------------------------------------------------------------


def to_table(record: dict[str, Any]) -> str:
  """The main numbers, for a screen: a table per workflow."""
  parts = []
  for workflow in record["workflows"]:
    rows = _rows(record, workflow["name"])
    if len(rows) > 1:
      lines = [line.rstrip() for line in align(rows)]
      parts.append("\n".join([_describe(workflow), *lines]))
  legend = textwrap.fill(_LEGEND, 100)
  return "\n\n".join([*parts, legend, _closing(record)])


def _rows(record: dict[str, Any], workflow: str) -> list[list[str]]:
  """Headings, and the cells of each measurement of a workflow."""
  mine = [m for m in record["measurements"] if m["workflow"] == workflow]
  shown = [
    measurement
    | {
      "itl_ms": _to_ms(measurement["itl_s"]),
      "burst_ms": _to_ms(measurement["burst_s"]),
      "peak_mib": measurement["peak_bytes"] / 2**20,
    }
    for measurement in mine
  ]
  heads = [heading for heading, _ in _COLUMNS]
  return [
    heads,
    *([form.format(**each) for _, form in _COLUMNS] for each in shown),
  ]


def _to_ms(seconds: dict[str, float]) -> dict[str, float]:
  return {rank: 1e3 * value for rank, value in seconds.items()}


def _describe(workflow: dict[str, Any]) -> str:
  return (
    f"{workflow['name']}: {workflow['requests']} requests a chain, "
    f"{workflow['depth']} one after the other, up to "
    f"{workflow['longest_tokens']} tokens of prompt and reply"
  )


def _closing(record: dict[str, Any]) -> str:
  """What holds for all tables."""
  compiled = sum(len(m["compiled"]) for m in record["measurements"])
  warm = "nothing was compiled meanwhile"
  if compiled:
    warm = f"{compiled} PROGRAMS WERE COMPILED MEANWHILE, see the JSON"
  return (
    f"{record['common_tokens']} tokens of system prompt begin all "
    f"conversations; {warm}.\n{footer(record)}"
  )


def check_report(path: str) -> None:
  """Raises ConfigError for a name that is no Markdown file's."""
  if pathlib.Path(path).suffix != ".md":
    raise ConfigError(f"--report={path} must end in .md")


def write_report(path: str, record: dict[str, Any], plot: str | None) -> None:
  """Writes the report as Markdown, whole or not at all.

  Args:
    path: of the file.
    record: of `to_record`.
    plot: path of the plot, or None.
  """
  shown = ""
  if plot:
    folder = pathlib.Path(path).absolute().parent
    place = pathlib.Path(plot).absolute().relative_to(folder, walk_up=True)
    shown = f"![throughput against interactivity]({place.as_posix()})"
  write_whole(path, to_markdown(record, shown), "--report")


def to_markdown(record: dict[str, Any], plot: str = "") -> str:
  """The report; `plot` is the line that shows it."""
  config, agents = record["config"], record["config"]["agents"]
  names = [workflow["name"] for workflow in record["workflows"]]
  lines = [
    line for line in agents["calls"] if line.split("/")[0].strip() in names
  ]
  parts = [
    "# Workloads of many agents",
    "Written by `python -m eval.agents` from its numbers; not to be edited.",
    f"Target `{config['target']['path'] or 'random'}`, drafter "
    f"`{pathlib.Path(config['drafter']['path']).name}`, "
    f"{config['target']['dtype']}, width policy "
    f"`{config['decode']['width'] or 'default'}`, rows "
    f"{', '.join(map(str, agents['rows']))}. {_closing(record)}",
    "The result depends on sizes: how long the common system prompt is "
    f"({record['common_tokens']} tokens), how short replies are "
    f"({agents['max_new_tokens']} tokens, unless a call says otherwise), and "
    "how much of a prompt is other agents' words.",
    *(_section(record, workflow) for workflow in record["workflows"]),
    _LEGEND,
    plot,
    "## The workflows",
    "```\n" + "\n".join(line.replace("\n", " ") for line in lines) + "\n```",
    "## How to read the tables",
    "\n".join(f"* `{key}`: {text}." for key, text in CONVENTIONS.items()),
  ]
  return "\n\n".join(part for part in parts if part) + "\n"


def _section(record: dict[str, Any], workflow: dict[str, Any]) -> str:
  head, *rows = _rows(record, workflow["name"])
  if not rows:
    return ""
  left = head.index("mode")
  rule = [":--" if place == left else "--:" for place in range(len(head))]
  table = "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
  name, _, text = _describe(workflow).partition(": ")
  return f"## {name}\n\n{text.capitalize()}.\n\n{table}"


# --- Plot ---------------------------------------------------------------------


def write_plot(path: str, record: dict[str, Any]) -> None:
  """Draws throughput against interactivity as a PNG.

  A panel per workflow, a line per mode, a point per concurrency.
  """
  import matplotlib.figure  # optional: only plots need it

  measurements = record["measurements"]
  names = list(dict.fromkeys(m["workflow"] for m in measurements))
  columns = min(len(names), 2)
  count = -(-len(names) // columns)
  figure = matplotlib.figure.Figure(
    figsize=(6 * columns, 4.5 * count), layout="constrained"
  )
  panels = figure.subplots(count, columns, squeeze=False).flat
  for name, axes in zip(names, panels, strict=False):
    _draw(axes, [m for m in measurements if m["workflow"] == name])
    axes.set(
      title=name,
      xlabel="interactivity: tokens/s per user",
      ylabel="throughput: tokens/s per device",
    )
  for axes in panels:  # left over
    axes.set_visible(False)
  handles, labels = figure.axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
  save_plot(figure, path)


def _draw(axes: Any, measurements: Sequence[dict[str, Any]]) -> None:
  """A workflow's lines; numbers are chains in flight."""
  for mode in dict.fromkeys(m["mode"] for m in measurements):
    mine = [m for m in measurements if m["mode"] == mode]
    places = [(m["user_tokens_per_s"], m["device_tokens_per_s"]) for m in mine]
    (line,) = axes.plot(
      *zip(*places, strict=True), marker="o", markersize=4, label=mode
    )
    for measurement, place in zip(mine, places, strict=True):
      axes.annotate(
        str(measurement["concurrency"]),
        place,
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=7,
        color=line.get_color(),
      )
  axes.margins(0.1)  # room for the numbers
  axes.set_ylim(bottom=0)
