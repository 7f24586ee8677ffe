"""Judges a drafter: acceptance, speed-up, losslessness.

    python -m eval.main --drafter=DIR --prompts=FILE --json_out=FILE

Decodes every prompt with the drafter and without, prints a table, and writes
JSON (--json_out) and a plot of acceptance by position (--plot_out).
"""

import dataclasses

from absl import flags

from dflash_jax import command
from dflash_jax.config import Config, ConfigError
from dflash_jax.model import load
from dflash_jax.prompts import read_prompts
from eval import acceptance, report, speed


def define_flags() -> None:
  """The flags of python -m eval.main, besides --config."""
  flags.DEFINE_string(
    "prompts",
    None,
    "A file of JSON lines with 'prompt', 'question' or 'turns'.",
  )
  flags.DEFINE_string(
    "drafter",
    None,
    "Directory of the drafter. Default: config.drafter.path.",
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
  flags.DEFINE_string("plot_out", None, "PNG of acceptance by position.")


def main(config: Config) -> None:
  """Entry point of python -m eval.main."""
  values = flags.FLAGS
  if not values.prompts:
    raise ConfigError("--prompts=FILE is missing; name a file of JSON lines")
  if values.plot_out:
    report.check_plot(values.plot_out)
  config = _override(config)
  prompts = read_prompts(values.prompts, config.eval.limit)
  model = load(config)
  comparisons = speed.decode_both_ways(model, prompts, config.eval)
  record = report.to_record(
    config,
    len(prompts),
    acceptance.summarize([c.speculative for c in comparisons]),
    speed.summarize(comparisons),
  )
  print(report.to_table(record))
  if values.json_out:
    report.write_json(values.json_out, record)
  if values.plot_out:
    report.write_plot(values.plot_out, record)


def _override(config: Config) -> Config:
  """The config, with the flags that are short for fields of it."""
  values = flags.FLAGS
  given = {
    name: getattr(values, name)
    for name in ("limit", "max_new_tokens", "batch_size")
    if getattr(values, name) is not None
  }
  path = config.drafter.path if values.drafter is None else values.drafter
  return dataclasses.replace(
    config,
    eval=dataclasses.replace(config.eval, **given),
    drafter=dataclasses.replace(config.drafter, path=path),
  )


if __name__ == "__main__":
  command.run(main, define_flags)
