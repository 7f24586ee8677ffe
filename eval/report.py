r"""One page of what evaluations found, made of their records alone.

    python -m eval.report RUN... --html=FILE --markdown=FILE

A RUN is a JSON file of eval.main, eval.suite or eval.agents, or a directory of
them. The page is one file that fetches nothing: tables with intervals, accepted
length and speed-up by prompt set, acceptance by position, the throughput curve,
where a round's time goes, and how and on what all of it was measured. Without
--html and --markdown the tables are printed.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from dflash_jax import command
from dflash_jax.config import Config, ConfigError
from eval import page, runs
from eval.markdown import to_markdown
from eval.records import write_whole

LIMIT = 3 * 2**20  # bytes of a page


def define_flags() -> None:
  """The flags of python -m eval.report."""
  flags.DEFINE_string("html", None, "The page.")
  flags.DEFINE_string("markdown", None, "The tables, for a README.")


def main(config: Config, *paths: str) -> None:
  """Entry point of python -m eval.report."""
  del config
  if not paths:
    raise ConfigError(
      "there is nothing to report; name records of eval.main, eval.suite or "
      "eval.agents, or a directory of them"
    )
  values = flags.FLAGS
  check_names(values.html, values.markdown)
  write(paths, values.html, values.markdown)


def check_names(html: str | None, markdown: str | None) -> None:
  """Raises ConfigError for a name that says another kind of file."""
  for path, endings in ((html, (".html", ".htm")), (markdown, (".md",))):
    if path and pathlib.Path(path).suffix not in endings:
      raise ConfigError(f"{path} must end in {endings[0]}")


def write(paths: Sequence[str], html: str | None, markdown: str | None) -> None:
  """Writes what is wanted, each file whole or not at all; else prints.

  Raises:
    ConfigError: for a record that is none, or a place that cannot be written.
  """
  found, curves = runs.read(paths)
  if not found and not curves:
    raise ConfigError(
      f"{', '.join(paths)}: every point was refused, so nothing was measured"
    )
  text = to_markdown(found, curves)
  if not html and not markdown:
    print(text)
  if html:
    whole = page.to_html(found, curves)
    if len(whole.encode()) > LIMIT:
      raise ConfigError(
        f"{len(found)} records make a page of more than {LIMIT / 2**20:.0f} "
        "MiB; report fewer at a time"
      )
    write_whole(html, whole, "--html")
  if markdown:
    write_whole(markdown, text, "--markdown")


if __name__ == "__main__":
  command.run(main, define_flags, takes_operands=True)
