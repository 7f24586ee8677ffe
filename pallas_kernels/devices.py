"""The device that code is compiled for, as far as kernels care."""

import dataclasses
import pathlib
import re

from jax.extend import backend

TARGETS = pathlib.Path(__file__).parent / "targets"
# Compute capability -> the implementation written for it.
ARCHITECTURES = {"9.0": "sm90", "10.0": "sm100", "10.3": "sm100"}


@dataclasses.dataclass(frozen=True)
class Device:
  """What a kernel is compiled for.

  Attributes:
    kind: as the driver names it.
    architecture: the implementation that can run on it; None for no kernel.
    num_cores: streaming multiprocessors; 1 where there are none.
  """

  kind: str
  architecture: str | None
  num_cores: int

  @classmethod
  def current(cls) -> "Device":
    """The default device while tracing: real, or described for a compiler."""
    device = backend.get_default_device()
    capability = str(getattr(device, "compute_capability", ""))
    return cls(
      kind=device.device_kind,
      architecture=ARCHITECTURES.get(capability),
      num_cores=getattr(device, "core_count", None) or 1,
    )


def cache_sizes() -> dict[str, int]:
  """Bytes of the L2 cache, of every model of GPU in targets/."""
  sizes = {}
  for file in TARGETS.glob("*.txtpb"):
    text = file.read_text()
    model = re.findall(r'device_description_str: "NVIDIA (\w+)', text)[0]
    sizes[model] = int(re.findall(r"l2_cache_size: (\d+)", text)[0])
  return sizes


def known_cache_bytes(kind: str) -> int | None:
  """The L2 cache's size; None of a device that is not in targets/."""
  words = kind.split()
  sizes = [size for model, size in cache_sizes().items() if model in words]
  return sizes[0] if sizes else None


def cache_bytes(kind: str) -> int:
  """The L2 cache's size; of a device not in targets/, the largest known."""
  return known_cache_bytes(kind) or max(cache_sizes().values())
