"""One mesh of all devices of all processes, and what lies where on it.

    axis    rows of a batch   masters, their average, the optimiser's state
    data    split             copied
    fsdp    split             split: a share of every large leaf on each device

A device works on rows of its own with the whole drafter. It gathers the masters
for the time of the pass and keeps its share of the summed gradient (ZeRO, arXiv
1910.02054; the gather is of all leaves at once). A float32 drafter of P
parameters under AdamW takes of a device 8 P bytes during the pass, and
12 P / fsdp always. The frozen target is whole on every device, without traffic:
8 GB where it has 4 billion parameters in bfloat16.

Where there is one device there is no mesh, None: nothing is placed, split or
summed, and the same formulas run as they are.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dflash_jax.config import ConfigError, TrainConfig

AXES = ("data", "fsdp")
ROWS, WHOLE = P(AXES), P()


def make_mesh(config: TrainConfig) -> Mesh | None:
  """The mesh that a config asks for, or None for one device.

  Raises:
    ConfigError: if it is not of all devices, if a batch cannot be split among
      them, or if what is asked for takes one process.
  """
  devices, fsdp = jax.device_count(), config.fsdp
  data = config.data or devices // fsdp
  if data * fsdp != devices:
    raise ConfigError(
      f"train.data={data} x train.fsdp={fsdp} is {data * fsdp} devices, and "
      f"there are {devices}; use train.data=0 and a train.fsdp that divides "
      f"{devices}"
    )
  pieces = devices * config.accumulate
  if config.batch_size % pieces:
    raise ConfigError(
      f"train.batch_size={config.batch_size} cannot be split among {devices} "
      f"devices in train.accumulate={config.accumulate} pieces each; use a "
      f"multiple of {pieces}, or fewer devices"
    )
  if config.hybrid_features and jax.process_count() > 1:
    raise ConfigError(
      "train.hybrid_features=True writes from one process, and there are "
      f"{jax.process_count()}; let train.feature_cache be built before the "
      "first step, or train with online features"
    )
  if devices == 1:
    return None
  return jax.make_mesh((data, fsdp), AXES, (AxisType.Explicit,) * 2)


# --- Placing ------------------------------------------------------------------


def share(mesh: Mesh, leaf: Any) -> NamedSharding:
  """Where a leaf of the state lies.

  Split along the largest axis that fsdp divides; whole if it has no such, or is
  a vector.
  """
  count = mesh.shape["fsdp"]
  sizes = [size if size % count == 0 else 0 for size in leaf.shape]
  spec = WHOLE
  if count > 1 and len(sizes) > 1 and any(sizes):
    spec = P(*[None] * sizes.index(max(sizes)), "fsdp")
  return NamedSharding(mesh, spec)


def create[T](mesh: Mesh | None, make: Callable[[], T]) -> T:
  """make(), a state; no device ever holds more of it than its share."""
  if mesh is None:
    return make()
  places = jax.tree.map(lambda leaf: share(mesh, leaf), jax.eval_shape(make))
  return jax.jit(make, out_shardings=places)()


def replicate[T](mesh: Mesh | None, tree: T) -> T:
  """Arrays that every process has, whole on every device."""
  if mesh is None:
    return tree

  copies: dict[int, jax.Array] = {}  # what the tree holds twice stays one

  def copy(leaf: jax.Array) -> jax.Array:
    if id(leaf) not in copies:
      copies[id(leaf)] = spread(leaf)
    return copies[id(leaf)]

  def spread(leaf: jax.Array) -> jax.Array:
    parts = [jax.device_put(leaf, device) for device in mesh.local_devices]
    return jax.make_array_from_single_device_arrays(
      leaf.shape, NamedSharding(mesh, WHOLE), parts
    )

  return jax.tree.map(copy, tree)


def gather[T](mesh: Mesh | None, tree: T) -> T:
  """The whole arrays, on this process's first device; all processes ask."""
  if mesh is None:
    return tree
  places = jax.tree.map(lambda _: NamedSharding(mesh, WHOLE), tree)
  return here(mesh, jax.jit(lambda tree: tree, out_shardings=places)(tree))


def here[T](mesh: Mesh | None, tree: T) -> T:
  """Arrays that are whole on every device, on this process's first one."""
  if mesh is None:
    return tree
  return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


# --- Rows of a batch ----------------------------------------------------------


def round_up(mesh: Mesh | None, count: int) -> int:
  """At least count rows, as many on each device."""
  devices = 1 if mesh is None else mesh.size
  return -(-count // devices) * devices


def local_rows(mesh: Mesh | None, count: int) -> np.ndarray:
  """i64[B]: which of a batch's count rows this process reads, in order."""
  rows = np.arange(count)
  if mesh is None:
    return rows
  places = NamedSharding(mesh, ROWS).addressable_devices_indices_map((count,))
  return np.unique(np.concatenate([rows[place] for place in places.values()]))


def place_rows[T](mesh: Mesh | None, tree: T, count: int) -> T:
  """A batch of count rows on its devices.

  Args:
    mesh: from `make_mesh`.
    tree: of numpy arrays that hold this process's rows, see `local_rows`.
    count: of all rows.
  """
  if mesh is None:
    return jax.tree.map(jnp.asarray, tree)
  mine, rows = local_rows(mesh, count), np.arange(count)

  def place(leaf: np.ndarray) -> jax.Array:
    def read(index: Any) -> np.ndarray:
      return leaf[np.searchsorted(mine, rows[index[0]])]

    shape = (count, *leaf.shape[1:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh, ROWS), read)

  return jax.tree.map(place, tree)


# --- Working on rows ----------------------------------------------------------


def sum_gradients[Sums](
  mesh: Mesh | None,
  function: Callable[..., tuple[Any, Sums]],
  params: Any,
  frozen: Any,
  batch: Any,
) -> tuple[Any, Sums]:
  """A gradient and sums, each over all rows of a batch.

  Args:
    mesh: from `make_mesh`.
    function: (params, frozen, some rows of the batch, their numbers i32[B]) ->
      (gradient like params, sums), added up over those rows.
    params: shares, as the gradient's will be.
    frozen: whole arrays.
    batch: rows.
  """
  if mesh is None:
    return function(params, frozen, batch, _number(batch, 0))
  specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, params)

  def run(params, frozen, batch):
    whole = jax.tree.map(_gather, params, specs)
    numbers = _number(batch, jax.lax.axis_index(AXES))
    gradient, sums = function(whole, frozen, batch, numbers)
    return jax.tree.map(_scatter, gradient, specs), jax.lax.psum(sums, AXES)

  # Without checks of what varies: formulas need not know of the mesh.
  return jax.shard_map(
    run, mesh=mesh, out_specs=(specs, WHOLE), check_vma=False
  )(params, frozen, batch)


def map_rows[Sums](
  mesh: Mesh | None,
  function: Callable[..., tuple[jax.Array, Sums]],
  params: Any,
  frozen: Any,
  batch: Any,
) -> tuple[jax.Array, Sums]:
  """An output of all rows, whole everywhere, and sums over them.

  Args:
    mesh, params, frozen, batch: as `sum_gradients` takes them.
    function: (params, frozen, some rows) -> (output of these rows, sums).
  """
  if mesh is None:
    return function(params, frozen, batch)
  specs = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, params)

  def run(params, frozen, batch):
    whole = jax.tree.map(_gather, params, specs)
    rows, sums = function(whole, frozen, batch)
    rows = jax.lax.all_gather(rows, AXES, tiled=True)
    return rows, jax.lax.psum(sums, AXES)

  return jax.shard_map(
    run, mesh=mesh, out_specs=(WHOLE, WHOLE), check_vma=False
  )(params, frozen, batch)


def apply_whole[T](
  mesh: Mesh | None, function: Callable[..., T], *trees: Any, like: T
) -> T:
  """function(*trees) as one device would compute it; the compiler splits it.

  For formulas over whole leaves, such as Muon's products and norms, which no
  device has.

  Args:
    mesh: from `make_mesh`.
    function: of the trees.
    *trees: shares.
    like: a tree of arrays that lie as the result should.
  """
  if mesh is None:
    return function(*trees)
  places = jax.tree.map(
    lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), like
  )
  return jax.sharding.auto_axes(function, out_sharding=places)(*trees)


def _number(batch: Any, part: jax.Array | int) -> jax.Array:
  """i32[B]: the numbers of the rows of one part of a batch."""
  count = jax.tree.leaves(batch)[0].shape[0]
  return part * count + jnp.arange(count, dtype=jnp.int32)


def _gather(leaf: jax.Array, spec: P) -> jax.Array:
  if "fsdp" not in spec:
    return leaf
  axis = spec.index("fsdp")
  return jax.lax.all_gather(leaf, "fsdp", axis=axis, tiled=True)


def _scatter(leaf: jax.Array, spec: P) -> jax.Array:
  """The sum over all devices, or this one's share of it."""
  if "fsdp" not in spec:
    return jax.lax.psum(leaf, AXES)
  part = jax.lax.psum_scatter(
    leaf, "fsdp", scatter_dimension=spec.index("fsdp"), tiled=True
  )
  return jax.lax.psum(part, "data")
