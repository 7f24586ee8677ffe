r"""Agents: chains of dependent requests, served in several modes.

    python -m eval.agents --config=configs/agents.py --workflows=team \
      --concurrency=1,4,8 --json_out=agents.json --plot_out=agents.png

Runs the workflows of config.agents plainly and speculatively, with shared
prefixes and without, at each number of chains in flight, on the engine
(dflash_jax/engine.py). Prints a table; writes all numbers as JSON, a plot of
throughput against interactivity, and a report in Markdown (--report).
docs/serving.md says how a workflow is written and what is measured.
"""

import dataclasses
from typing import Any

from absl import flags

from dflash_jax import command
from dflash_jax.config import Config
from dflash_jax.model import load
from eval import agents_report, plots, records
from eval.workload import Workload


def define_flags() -> None:
  """The flags of python -m eval.agents, besides --config."""
  flags.DEFINE_list(
    "workflows",
    None,
    "Names of those to measure. Default: config.agents.workflows.",
  )
  flags.DEFINE_list(
    "concurrency",
    None,
    "Chains in flight, a measurement each, such as 1,8. Default: "
    "config.agents.concurrency.",
  )
  flags.DEFINE_integer(
    "chains",
    None,
    "Chains of a measurement, at least. Default: config.agents.chains.",
  )
  flags.DEFINE_string(
    "drafter",
    None,
    "Directory of the drafter, or ngram. Default: config.drafter.path.",
  )
  flags.DEFINE_string(
    "json_out", None, "File for all numbers, written anew as they come."
  )
  flags.DEFINE_string(
    "plot_out", None, "PNG of throughput against interactivity."
  )
  flags.DEFINE_string("report", None, "Markdown file of all that was found.")


def main(config: Config) -> None:
  """Entry point of python -m eval.agents."""
  values = flags.FLAGS
  config = _override(config)
  if values.plot_out:
    plots.check_plot(values.plot_out)
  if values.report:
    agents_report.check_report(values.report)
  workload, model = Workload.plan(config), load(config)
  sizes = workload.describe(model)
  found: list[dict[str, Any]] = []
  record: dict[str, Any] = {}
  for measurement in workload.measure(model):
    found += agents_report.summarize(measurement)
    record = agents_report.to_record(config, sizes, found)
    if values.json_out:
      records.write_json(values.json_out, record)
  print(agents_report.to_table(record))
  if values.plot_out:
    agents_report.write_plot(values.plot_out, record)
  if values.report:
    agents_report.write_report(values.report, record, values.plot_out)


def _override(config: Config) -> Config:
  """The config, with the flags that are short for fields of it."""
  values = flags.FLAGS
  given: dict[str, Any] = {}
  if values.workflows is not None:
    given["workflows"] = tuple(values.workflows)
  if values.concurrency is not None:
    given["concurrency"] = command.whole_numbers(
      "--concurrency", values.concurrency
    )
  if values.chains is not None:
    given["chains"] = values.chains
  path = config.drafter.path if values.drafter is None else values.drafter
  return dataclasses.replace(
    config,
    agents=dataclasses.replace(config.agents, **given),
    drafter=dataclasses.replace(config.drafter, path=path),
  )


if __name__ == "__main__":
  command.run(main, define_flags)
