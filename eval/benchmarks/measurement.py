"""What a benchmark's replies show: acceptance by category, and accuracy."""

import math
from collections.abc import Sequence
from typing import Any

import tqdm

from dflash_jax.compare import Comparison
from eval import acceptance
from eval.benchmarks import answers, catalog, programs, trials
from eval.benchmarks.benchmark import Benchmark
from eval.benchmarks.tasks import Program
from eval.benchmarks.trials import Limits

_Z = 1.959964  # of a 95% interval


def measure(
  benchmark: Benchmark,
  comparisons: Sequence[Comparison],
  *,
  max_new_tokens: int,
  limits: Limits | None = None,
) -> dict[str, Any]:
  """The benchmark's own part of a record.

  Args:
    benchmark: whose prompts were decoded, all of them.
    comparisons: one per turn, prompts in order.
    max_new_tokens: of a reply; one as long counts as unfinished.
    limits: of programs, which are run only if these are given.

  Returns:
    "benchmark", its facts; "by_category", where there are some: replies, rounds
    and tau, as in acceptance.Acceptance; and "accuracy", where replies can be
    checked: see `judge`.
  """
  found: dict[str, Any] = {"benchmark": benchmark.facts}
  categories = [
    category
    for prompt, category in zip(
      benchmark.prompts, benchmark.categories, strict=True
    )
    for _ in prompt.turns
  ]
  if any(categories):
    replies = [each.speculative for each in comparisons]
    found["by_category"] = acceptance.summarize_by(categories, replies)
  if benchmark.scored and (benchmark.scored != catalog.TESTS or limits):
    found["accuracy"] = judge(benchmark, comparisons, max_new_tokens, limits)
  return found


def judge(
  benchmark: Benchmark,
  comparisons: Sequence[Comparison],
  max_new_tokens: int,
  limits: Limits | None = None,
) -> dict[str, Any]:
  """Accuracy of both ways of decoding.

  Args:
    benchmark: with references, and one turn per prompt.
    comparisons: one per prompt, in order.
    max_new_tokens: of a reply.
    limits: of programs.

  Returns:
    "plain" and "speculative", shares of replies that are right; "interval",
    Wilson's of 95% for each; "n", prompts; "unlike", prompts where one is right
    and the other wrong, 0 where both say the same; "unfinished", replies that
    ran out of tokens; "how" replies were judged.
  """
  rights: dict[str, list[bool]] = {"plain": [], "speculative": []}
  pairs = list(zip(benchmark.references, comparisons, strict=True))
  unit = "program" if benchmark.scored == catalog.TESTS else "answer"
  for reference, comparison in tqdm.tqdm(pairs, unit=unit, disable=None):
    # Equal replies are judged once: a program's time may vary.
    known: dict[str, bool] = {}
    for name, right in rights.items():
      text = getattr(comparison, name).text
      if text not in known:
        known[text] = is_right(benchmark.scored, text, reference, limits)
      right.append(known[text])
  n = len(pairs)
  ends = [c.speculative.tokens for c in comparisons]
  return {
    **{name: sum(right) / n for name, right in rights.items()},
    "interval": {name: wilson(sum(r), n) for name, r in rights.items()},
    "n": n,
    "unlike": sum(a != b for a, b in zip(*rights.values(), strict=True)),
    "unfinished": sum(len(tokens) >= max_new_tokens for tokens in ends),
    "how": benchmark.scored + (_say_limits(limits) if limits else ""),
  }


def is_right(
  scored: str,
  reply: str,
  reference: str | Program | None,
  limits: Limits | None = None,
) -> bool:
  """Whether a reply is right, by the rule of the benchmark (Entry.scored)."""
  if isinstance(reference, Program):
    assert limits is not None
    solution = programs.assemble(reply, reference)
    return trials.run(solution, reference.tests, limits).passed
  assert isinstance(reference, str)
  if scored == catalog.NUMBER:
    return answers.match_number(reply, reference)
  return answers.match_formula(reply, reference)


def wilson(right: int, n: int) -> list[float]:
  """Wilson's interval of 95% for a share (J. Am. Stat. Assoc. 22, 1927)."""
  share, spread = right / n, _Z**2 / n
  middle = (share + spread / 2) / (1 + spread)
  half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
  return [max(middle - half, 0.0), min(middle + half, 1.0)]


def to_table(found: dict[str, Any]) -> str:
  """What `measure` found, for a screen."""
  facts = found["benchmark"]
  lines = [f"{facts['name']}: {facts['prompts']} of {facts['of']} tasks"]
  for category, row in sorted(found.get("by_category", {}).items()):
    lines.append(
      f"  {category:24}{row['requests']:>6} replies"
      f"{row['tau_per_request']:>8.3f} tau/reply"
      f"{row['tau_per_round']:>8.3f} tau/round"
    )
  if accuracy := found.get("accuracy"):
    for name in ("plain", "speculative"):
      low, high = accuracy["interval"][name]
      lines.append(
        f"  {'accuracy, ' + name:24}{accuracy[name]:>7.1%}  "
        f"95% interval {low:.1%} to {high:.1%}"
      )
    lines.append(
      f"  {accuracy['unlike']} judged unlike, {accuracy['unfinished']} of "
      f"{accuracy['n']} unfinished; right: {accuracy['how']}"
    )
  return "\n".join(lines)


def _say_limits(limits: Limits) -> str:
  isolation = "isolated" if limits.isolate else "NOT isolated"
  return (
    f", in {limits.seconds:g} s and {limits.memory_bytes / 2**20:.0f} MiB, "
    f"{isolation}"
  )
