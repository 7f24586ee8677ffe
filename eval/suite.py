r"""Several drafters side by side, on several prompt sets and temperatures.

    python -m eval.suite --config=configs/suite.py --output=DIR \
      --report=FILE.html

Writes into DIR a record for each prompt set, drafter and temperature of
config.suite, as eval.main would, and leaves alone what is there: a suite that
was cut short, or has a new drafter, goes on. --report makes the page of
eval.report at once. docs/protocol.md says what is measured, and how.
"""

import dataclasses
import pathlib

from absl import flags

from dflash_jax import command
from dflash_jax.config import Config, ConfigError
from eval import report
from eval.contest import Contest


def define_flags() -> None:
  """The flags of python -m eval.suite, besides --config."""
  flags.DEFINE_string("output", None, "Directory of the records.")
  flags.DEFINE_string("report", None, "HTML page of all that was found.")
  flags.DEFINE_string("markdown", None, "The same tables, for a README.")
  flags.DEFINE_bool(
    "ladder",
    False,
    "Have the target read every reply again (docs/protocol.md); takes about "
    "as long as decoding it once more.",
  )
  flags.DEFINE_list(
    "concurrency",
    None,
    "Requests in flight, a point of the throughput curve each, such as 1,2,4. "
    "Default: config.suite.concurrency.",
  )


def main(config: Config) -> None:
  """Entry point of python -m eval.suite."""
  values = flags.FLAGS
  if not values.output:
    raise ConfigError("--output=DIR is missing; name a directory for records")
  report.check_names(values.report, values.markdown)
  if values.concurrency is not None:
    concurrency = command.whole_numbers("--concurrency", values.concurrency)
    suite = dataclasses.replace(config.suite, concurrency=concurrency)
    config = dataclasses.replace(config, suite=suite)
  contest = Contest.plan(config, pathlib.Path(values.output))
  contest.run(has_ladder=values.ladder)
  report.write([values.output], values.report, values.markdown)


if __name__ == "__main__":
  command.run(main, define_flags)
