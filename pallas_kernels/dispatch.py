"""Which implementation of an operation runs.

`None` asks for the fastest that this device and these arguments allow, and
says once what it got. A name asks for that one and nothing else:
NotImplementedError means that it cannot run here, ValueError that no
implementation could.
"""

import functools
import logging

from pallas_kernels.devices import ARCHITECTURES, Device

KERNELS = tuple(dict.fromkeys(ARCHITECTURES.values()))
IMPLEMENTATIONS = ("xla", *KERNELS)


def choose(
  operation: str, implementation: str | None, limit: str | None
) -> tuple[str, Device]:
  """The implementation to run, and the device it is for.

  Args:
    operation: its name, for messages.
    implementation: None, or one of IMPLEMENTATIONS.
    limit: why no kernel takes these arguments; None if kernels do.
  """
  device = Device.current()
  if implementation is None:
    fits = device.architecture is not None and limit is None
    chosen = device.architecture if fits else "xla"
    assert chosen is not None
    _log_once(operation, chosen, device, limit or "no kernel for it")
    return chosen, device
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"{operation}: implementation={implementation!r} is unknown; choose one "
      f"of {', '.join(IMPLEMENTATIONS)}, or None for the fastest"
    )
  if implementation == "xla":
    return implementation, device
  if implementation != device.architecture:
    able = device.architecture or "xla"
    raise NotImplementedError(
      f"{operation}: implementation={implementation!r} cannot run on "
      f"{device.kind}; use {able!r}, or None for the fastest"
    )
  if limit is not None:
    raise NotImplementedError(
      f"{operation}: implementation={implementation!r}: {limit}; use 'xla', or "
      "None for the fastest"
    )
  return implementation, device


@functools.cache
def _log_once(operation: str, chosen: str, device: Device, reason: str) -> None:
  # Where no kernel could run there was nothing to choose.
  level = logging.INFO if device.architecture else logging.DEBUG
  why = f" ({reason})" if chosen == "xla" else ""
  logging.getLogger(__name__).log(
    level, "%s on %s: %s%s", operation, device.kind, chosen, why
  )
