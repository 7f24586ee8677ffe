"""Judges a drafter: acceptance, speed-up, losslessness.

    python -m eval.main --drafter=DIR --prompts=FILE --json_out=FILE
    python -m eval.main --benchmark=gsm8k --data_dir=DIR --json_out=FILE

Decodes every prompt with the drafter and without, prints a table, and writes
JSON (--json_out) and a plot of acceptance by position (--plot_out). A benchmark
adds acceptance by category and accuracy: docs/benchmarks.md.

    python -m eval.main --sweep --prompts=FILE --limit=4 --max_new_tokens=64

compares many ways to decode, the points of config.eval.sweep: a row of the
table each, and a plot of speed-up against tau. Lines of one's own, each a
product of axes:

    --config.eval.sweep='("width=fixed:3,goodput", "tree_nodes=8,16")'
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import flags

from dflash_jax import command, decode_flags
from dflash_jax.config import Config, ConfigError
from dflash_jax.model import load
from eval import benchmarks, ladder, plots, records, speed, sweep, tables
from eval.benchmarks import trials
from eval.prompt_sets import PromptSet

# The record, its table, and what draws it into a file.
Judgement = tuple[dict[str, Any], str, Callable[[str, dict[str, Any]], None]]


def define_flags() -> None:
  """The flags of python -m eval.main, besides --config."""
  flags.DEFINE_string(
    "prompts",
    None,
    "A file of JSON lines with 'prompt', 'question' or 'turns'.",
  )
  flags.DEFINE_enum(
    "benchmark",
    None,
    benchmarks.NAMES,
    "Prompts of a benchmark, instead of --prompts.",
  )
  flags.DEFINE_string(
    "data_dir",
    "",
    "Directory with the benchmark's files, in a folder of its name. Default: "
    "the hub.",
  )
  flags.DEFINE_enum(
    "thinking",
    None,
    ("on", "off"),
    "Thinking mode of the target's chat template. Default: "
    "config.target.thinking.",
  )
  flags.DEFINE_enum(
    "run_code",
    "off",
    ("off", "isolated", "unisolated"),
    "Run what the model writes for a benchmark of code, against its tests. DO "
    "SO IN A CONTAINER: docs/benchmarks.md.",
  )
  flags.DEFINE_string(
    "drafter",
    None,
    "Directory of the drafter, or ngram. Default: config.drafter.path.",
  )
  flags.DEFINE_integer(
    "limit", None, "Prompts used; 0 for all. Default: config.eval.limit."
  )
  flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Longest reply. Default: config.eval.max_new_tokens.",
  )
  flags.DEFINE_integer(
    "batch_size",
    None,
    "Prompts decoded together. Default: config.eval.batch_size.",
  )
  flags.DEFINE_string("json_out", None, "File for all results.")
  flags.DEFINE_string(
    "plot_out",
    None,
    "PNG of acceptance by position; of a sweep, of speed-up against tau.",
  )
  flags.DEFINE_bool(
    "sweep", False, "Compare the ways to decode in config.eval.sweep."
  )
  flags.DEFINE_bool(
    "ladder",
    False,
    "Have the target read every reply again, see docs/protocol.md.",
  )
  decode_flags.define_flags()


def main(config: Config) -> None:
  """Entry point of python -m eval.main."""
  values = flags.FLAGS
  _check_source()
  if values.plot_out:
    plots.check_plot(values.plot_out)
  config = _override(config)
  judge = _sweep if values.sweep else _compare
  record, table, draw = judge(config)
  print(table)
  if values.json_out:
    records.write_json(values.json_out, record)
  if values.plot_out:
    draw(values.plot_out, record)


def _check_source() -> None:
  """Raises ConfigError unless flags say in one way what is asked."""
  values = flags.FLAGS
  if not (values.prompts or values.benchmark):
    raise ConfigError(
      "--prompts=FILE is missing; name a file of JSON lines, or --benchmark="
      f"{'|'.join(benchmarks.NAMES)}"
    )
  if values.prompts and values.benchmark:
    raise ConfigError(
      "--prompts and --benchmark are two sources of prompts; leave one out"
    )
  if values.sweep and values.ladder:
    raise ConfigError(
      "--ladder reads the replies of one way to decode again, and --sweep has "
      "many; drop one of them"
    )
  if values.sweep and values.run_code != "off":
    raise ConfigError(
      "--run_code judges one way to decode, not a sweep; leave one out"
    )
  if not values.benchmark and (values.data_dir or values.run_code != "off"):
    raise ConfigError(
      "--data_dir and --run_code belong to a benchmark; name it in --benchmark"
    )


def _read(config: Config) -> tuple[PromptSet, benchmarks.Benchmark | None]:
  """The prompts, and the benchmark if they are of one."""
  values = flags.FLAGS
  if not values.benchmark:
    return PromptSet.read(values.prompts, config.eval.limit), None
  limits = _limits()
  if limits:
    trials.check(limits)
  benchmark = benchmarks.load(
    values.benchmark,
    values.data_dir,
    config.eval.limit,
    run_code=limits is not None,
  )
  return PromptSet.of(benchmark.name, benchmark.prompts), benchmark


def _limits() -> trials.Limits | None:
  """Of programs that the model writes; None runs none."""
  if flags.FLAGS.run_code == "off":
    return None
  return trials.Limits(isolate=flags.FLAGS.run_code == "isolated")


def _compare(config: Config) -> Judgement:
  """Judges the drafter as the config's decode section uses it."""
  prompt_set, benchmark = _read(config)
  model = load(config)
  prompts = prompt_set.prompts
  comparisons = speed.decode_both_ways(model, prompts, config.eval)
  rule = model.decoder().rule
  record = records.to_record(
    config, len(prompts), rule, comparisons, model.drafter_bytes, prompt_set
  )
  table = tables.to_table(record)
  if flags.FLAGS.ladder:
    record["ladder"] = ladder.climb(
      model, speed.plan(model, prompts, config.eval), comparisons
    )
  if benchmark:
    found = benchmarks.measure(
      benchmark,
      comparisons,
      max_new_tokens=config.eval.max_new_tokens,
      limits=_limits(),
    )
    record |= found
    table += "\n\n" + benchmarks.to_table(found)
  return record, table, plots.write_plot


def _sweep(config: Config) -> Judgement:
  """Judges every point of the sweep."""
  points = sweep.plan(config)
  prompt_set, benchmark = _read(config)
  prompts = prompt_set.prompts
  results = sweep.evaluate(load(config), prompts, points, config.eval)
  record = records.to_sweep_record(config, len(prompts), results)
  if benchmark:
    record["benchmark"] = benchmark.facts
  return record, tables.to_sweep_table(record), plots.write_sweep_plot


def _override(config: Config) -> Config:
  """The config, with the flags that are short for fields of it."""
  values = flags.FLAGS
  given = {
    name: getattr(values, name)
    for name in ("limit", "max_new_tokens", "batch_size")
    if getattr(values, name) is not None
  }
  path = config.drafter.path if values.drafter is None else values.drafter
  thinking = values.thinking or config.target.thinking
  return decode_flags.override(
    dataclasses.replace(
      config,
      eval=dataclasses.replace(config.eval, **given),
      drafter=dataclasses.replace(config.drafter, path=path),
      target=dataclasses.replace(config.target, thinking=thinking),
    )
  )


if __name__ == "__main__":
  command.run(main, define_flags)
