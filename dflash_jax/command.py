"""How every program of the project starts, and how it fails.

A program gives `run` its main function, which takes the Config, and a function
that defines its own flags. Both are called only when the program runs, so that
importing a program's module defines nothing.
"""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from dflash_jax import config_file
from dflash_jax.config import ConfigError
from dflash_jax.prompts import PromptError
from dflash_jax.tokenizer import TokenizerError
from dflash_jax.weights import WeightsError

EXPECTED = (ConfigError, PromptError, TokenizerError, WeightsError)


def run(
  main: Callable[..., None],
  define_flags: Callable[[], None] = lambda: None,
  *,
  errors: tuple[type[Exception], ...] = (),
  takes_operands: bool = False,
) -> NoReturn:
  """Parses flags, --config and its overrides among them, and calls main.

  An expected error ends the program with one line on stderr and exit code 2;
  any other is a bug and keeps its traceback.

  Args:
    main: takes the config, overrides applied, and any operands.
    define_flags: defines the program's other flags.
    errors: expected ones, besides those of the library.
    takes_operands: whether arguments may stand there that are no options.
  """
  expected = EXPECTED + errors
  define_flags()
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Run configuration, a Python file (see configs/). Its fields are set as "
    f"--config.decode.batch_size=4. Default: {config_file.DEFAULT}.",
  )
  # Listed by --help as if the program itself had defined it.
  flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])
  if not any(re.match("--?config(=|$)", argument) for argument in sys.argv):
    sys.argv.insert(1, f"--config={config_file.default_path()}")

  # JAX tells at this level which backends a machine does not have.
  logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)

  def guarded(arguments: Sequence[str]) -> None:
    try:
      operands = arguments[1:]
      if operands and not takes_operands:
        raise ConfigError(
          f"stray argument {operands[0]!r}; every option starts with --"
        )
      config_file.check_values(flags.FLAGS.config)
      main(flags.FLAGS.config, *operands)
    except expected as error:
      _fail(error)
    except KeyboardInterrupt:
      sys.exit(130)

  app.run(guarded, flags_parser=_parse)


def _parse(arguments: Sequence[str]) -> list[str]:
  """Parses flags; any mistake in them ends the program."""
  try:
    _check_config(arguments)
    return flags.FLAGS(arguments)
  except (ConfigError, flags.Error) as error:
    _fail(error)


def _check_config(arguments: Sequence[str]) -> None:
  """Names what ml_collections would report at length, or not at all."""
  path, names = "", []
  for index, argument in enumerate(arguments):
    flag, has_value, value = argument.lstrip("-").partition("=")
    if not argument.startswith("-"):
      continue
    if flag == "config":
      path = value if has_value else (*arguments, "")[index + 1]
    elif re.match(r"(no)?config\.", flag):
      names.append(flag.partition(".")[2])
  config_file.check_overrides(config_file.read(path), names)


def _fail(error: Exception) -> NoReturn:
  message = " ".join(str(error).split())
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def whole_numbers(flag: str, words: Sequence[str]) -> tuple[int, ...]:
  """The numbers that a flag names; ConfigError for what is none."""
  numbers = []
  for word in words:
    try:
      numbers.append(int(word))
    except ValueError as error:
      raise ConfigError(
        f"{flag} takes whole numbers joined by commas, not {word!r}"
      ) from error
  return tuple(numbers)
