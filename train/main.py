"""Trains a drafter: python -m train.main --config=FILE --workdir=DIR."""

from absl import flags

from dflash_jax import command
from dflash_jax.config import Config, ConfigError
from train.checkpoint import quieten_orbax
from train.files import FileError
from train.loop import TrainingDiverged, train


def define_flags() -> None:
  """The flags of python -m train.main, besides --config."""
  flags.DEFINE_string(
    "workdir", None, "Directory for checkpoints, metrics and the run's config."
  )
  flags.DEFINE_bool(
    "resume", False, "Continue from the newest checkpoint in --workdir."
  )


def main(config: Config) -> None:
  """Entry point of python -m train.main."""
  if not flags.FLAGS.workdir:
    raise ConfigError("--workdir=DIR is missing; name a directory for the run")
  quieten_orbax()
  train(config, flags.FLAGS.workdir, flags.FLAGS.resume)


if __name__ == "__main__":
  command.run(main, define_flags, errors=(FileError, TrainingDiverged))
