"""Compiling for a GPU that is not here, from a description of it."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

TARGETS = pathlib.Path(__file__).parent / "targets"


@functools.cache
def describe(target: str) -> tuple[Any, jax.sharding.Sharding]:
  """A device of targets/<target>.txtpb, and the sharding that places on it."""
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

  The compiler keeps the architecture of the first kernel that it meets. And a
  kernel is written for the default device, so that is the target meanwhile;
  else Hopper's code would be compiled for Blackwell, without a word.
  """
  device, placed = describe(target)
  operands = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), operands
  )
  with jax.default_device(device):
    lowered = jax.jit(function).trace(*operands).lower()
  return lowered.compile()
