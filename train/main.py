r"""Trains a drafter: python -m train.main --config=FILE --workdir=DIR.

On all devices of this machine, or of many: one process on each, started with
the same flags and its own number.

    python -m train.main --config=FILE --workdir=DIR \
        --coordinator=HOST:PORT --processes=2 --process=0
"""

from absl import flags

from dflash_jax import command
from dflash_jax.config import Config, ConfigError, to_json
from train import processes
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
  flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0, for a run of many processes; or cluster, to ask "
    "the environment (Slurm, Open MPI, TPU pods).",
  )
  flags.DEFINE_integer("processes", None, "How many there are.")
  flags.DEFINE_integer("process", None, "Number of this one, from 0.")


def main(config: Config) -> None:
  """Entry point of python -m train.main."""
  values = flags.FLAGS
  if not values.workdir:
    raise ConfigError("--workdir=DIR is missing; name a directory for the run")
  processes.join(values.coordinator, values.process, values.processes)
  told = (values.workdir, values.resume, values.processes, to_json(config))
  processes.check_same("--config, --workdir, --resume or --processes", told)
  quieten_orbax()
  train(config, values.workdir, values.resume)


if __name__ == "__main__":
  command.run(main, define_flags, errors=(FileError, TrainingDiverged))
