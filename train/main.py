"""Trains a drafter: python -m train.main --config=FILE --workdir=DIR."""

from absl import app, flags
from ml_collections import config_flags

from train.loop import train

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Run configuration, a file of configs/."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory for checkpoints, metrics and the run's config."
)
_RESUME = flags.DEFINE_bool(
  "resume", False, "Continue from the newest checkpoint in --workdir."
)


def main(_) -> None:
  """Entry point."""
  train(_CONFIG.value, _WORKDIR.value, _RESUME.value)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main)
