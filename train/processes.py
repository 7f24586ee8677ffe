"""Processes that train one drafter together: meeting, agreeing, taking turns.

They share one filesystem: corpus, feature cache and workdir are the same
directories for all. Each reads its own rows of every batch and saves its own
shares of a checkpoint; process 0 alone writes what is not split.
"""

import contextlib
import re
import socket
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from dflash_jax.config import ConfigError

MEETING = 300  # seconds to wait for the others at the start
PARTING = 60  # seconds to wait for them at the end, or after an error


def join(coordinator: str, process: int | None, processes: int | None) -> None:
  """Meets the other processes, before anything asks for a device.

  Args:
    coordinator: HOST:PORT where process 0 listens; "cluster" lets JAX ask the
      environment, such as Slurm's or a TPU pod's; "" is a process alone.
    process: number of this one, from 0.
    processes: how many there are.

  Raises:
    ConfigError: for what does not fit together, or if the others do not come.
  """
  if not coordinator:
    if process is not None or processes is not None:
      raise ConfigError(
        f"--process={process} --processes={processes} need --coordinator="
        "HOST:PORT, where process 0 listens; or leave them out to train alone"
      )
    return
  if coordinator == "cluster":
    if process is not None or processes is not None:
      raise ConfigError(
        f"--coordinator=cluster knows better than --process={process} "
        f"--processes={processes}; leave them out"
      )
    _initialize(None, None, None)
    return
  if not re.fullmatch(r"\S+:\d+", coordinator):
    raise ConfigError(
      f"--coordinator={coordinator} is no address; write HOST:PORT, or cluster"
    )
  if process is None or processes is None:
    raise ConfigError(
      f"--coordinator={coordinator} needs --process=I and --processes=N"
    )
  if not 0 <= process < processes:
    raise ConfigError(
      f"--process={process} of --processes={processes} is impossible; number "
      f"them 0 to {max(processes - 1, 0)}"
    )
  _initialize(coordinator, process, processes)


def _initialize(
  coordinator: str | None, process: int | None, processes: int | None
) -> None:
  if process:
    _await_listener(str(coordinator), process)
  elif processes:
    # If they stay away, JAX ends this process with a message of its own.
    logging.info(
      "waiting up to %d s at %s for %d other processes",
      MEETING,
      coordinator,
      processes - 1,
    )
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      initialization_timeout=MEETING,
      shutdown_timeout_seconds=PARTING,
    )
  except (RuntimeError, ValueError) as error:
    place = coordinator or "the cluster that the environment describes"
    raise ConfigError(
      f"cannot meet other processes at {place} ({error}); give each of them "
      "--coordinator=HOST:PORT, --processes=N and its own --process=I"
    ) from error
  if not is_first():
    logging.set_verbosity(logging.ERROR)


def _await_listener(coordinator: str, process: int) -> None:
  """Raises ConfigError unless process 0 listens in time."""
  host, _, port = coordinator.rpartition(":")
  deadline = time.monotonic() + MEETING
  while time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    time.sleep(0.2)
  raise ConfigError(
    f"--process={process} found nobody at --coordinator={coordinator} in "
    f"{MEETING} s; start process 0 there, and all with the same address"
  )


def is_first() -> bool:
  """Whether this process writes what all of them know."""
  return jax.process_index() == 0


def check_same(what: str, value: Any) -> None:
  """Refuses processes that were told different things.

  Args:
    what: this is, with its flags.
    value: of this process, told apart by its text; every process asks.

  Raises:
    ConfigError: in all processes alike, naming those that differ from 0.
  """
  if jax.process_count() == 1:
    return
  own = np.uint32(zlib.crc32(repr(value).encode()))
  every = multihost_utils.process_allgather(own)
  others = np.flatnonzero(every != every[0]).tolist()
  if others:
    raise ConfigError(
      f"processes {others} were started with other {what} than process 0; "
      "start all with the same"
    )


def take_turns[T](function: Callable[[], T]) -> T:
  """What process 0 makes of it, then the others, who find what it wrote."""
  if jax.process_count() == 1:
    return function()
  try:
    if is_first():
      return function()
  finally:  # those who wait must not wait for ever
    multihost_utils.sync_global_devices("turn")
  return function()


def tell[T](value: T) -> T:
  """Process 0's arrays, in every process."""
  return multihost_utils.broadcast_one_to_all(value)
