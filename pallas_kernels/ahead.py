"""Compiling for a GPU that is not here, from a description of it."""

import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.devices import TARGETS

# Package of the extra `aot` -> what kernels are compiled with, below any folder
# of the import path.
PARTS = {
  "jax-cuda13-plugin": "jax_cuda13_plugin",
  "jax-cuda13-pjrt": "jax_plugins/xla_cuda13",
  "nvidia-cuda-nvcc": "nvidia/cu13/bin/ptxas",
  "nvidia-nvvm": "nvidia/cu13/nvvm/libdevice",
  "nvidia-cuda-nvdisasm": "nvidia/cu13/bin/nvdisasm",
}


def find_tools() -> pathlib.Path:
  """The folder of the assembler and the disassembler.

  Raises:
    ModuleNotFoundError: a package is missing.
  """
  found = {
    package: [
      path
      for folder in sys.path
      if (path := pathlib.Path(folder, part)).exists()
    ]
    for package, part in PARTS.items()
  }
  if missing := [package for package, paths in found.items() if not paths]:
    raise ModuleNotFoundError(
      f"{', '.join(missing)}: not on the import path. `make aot` installs what "
      "compiling without a GPU needs (the extra `aot`) and runs with it"
    )
  return found["nvidia-cuda-nvcc"][0].parent


@functools.cache
def describe(target: str) -> tuple[Any, jax.sharding.Sharding]:
  """A device of targets/<target>.txtpb, and the sharding that places on it.

  Raises:
    RuntimeError: another target was described before. The compiler keeps the
      architecture of a process's first kernel.
  """
  if describe.cache_info().currsize:
    raise RuntimeError(f"{target} is a second target: take another process")
  topology = topologies.get_topology_desc(
    platform="cuda",
    target_config=(TARGETS / f"{target}.txtpb").read_text(),
    topology="1x1x1",
  )
  mesh = topologies.make_mesh(
    topo=topology, mesh_shape=(1,), axis_names=("device",)
  )
  placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return topology.devices[0], placed


def compile_for(
  target: str, function: Callable[..., Any], operands: tuple[Any, ...]
) -> jax.stages.Compiled:
  """Compiles a function of abstract operands; one target a process.

  A kernel is written for the default device, so that is the target meanwhile;
  else code for Hopper could be compiled for Blackwell, without a word.
  """
  device, placed = describe(target)
  operands = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), operands
  )
  with jax.default_device(device):
    lowered = jax.jit(function).trace(*operands).lower()
  return lowered.compile()
