"""Large axes in pieces: only one piece's intermediates are alive."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from train.sums import SlotSums


def add_pieces[T](function: Callable[[Any], T], arrays: Any, count: int) -> T:
  """The sum of function(piece) over pieces of the leading axis.

  Args:
    function: gives a pytree of the same shapes for each.
    arrays: a pytree whose leading axes are multiples of count.
    count: of pieces.
  """
  if count == 1:
    return function(arrays)
  pieces = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), arrays)

  def add(total: T, piece: Any) -> tuple[T, tuple[()]]:
    return jax.tree.map(jnp.add, total, function(piece)), ()

  like = jax.eval_shape(function, jax.tree.map(lambda x: x[0], pieces))
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  return jax.lax.scan(add, nothing, pieces)[0]


def map_pieces(
  function: Callable[[Any], tuple[jax.Array, SlotSums]],
  arrays: Any,
  size: int,
  axis: int = 0,
) -> tuple[jax.Array, SlotSums]:
  """Applies function to pieces of an axis, one alive at a time, also backward.

  Args:
    function: pieces -> (output with that axis, SlotSums).
    arrays: a pytree that shares the axis; its last piece is padded with zeros,
      which masks read as void.
    size: of a piece.
    axis: which.
  """
  length = jax.tree.leaves(arrays)[0].shape[axis]
  count = -(-length // size)
  if count == 1:
    return function(arrays)

  def cut(x):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, count * size - length)
    shape = (*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, widths).reshape(shape), axis, 0)

  pieces = jax.tree.map(cut, arrays)
  outputs, sums = jax.lax.map(jax.checkpoint(function), pieces)
  outputs = jnp.moveaxis(outputs, 0, axis)
  shape = (
    *outputs.shape[:axis],
    count * size,
    *outputs.shape[axis + 2 :],
  )
  outputs = outputs.reshape(shape)
  outputs = jax.lax.slice_in_dim(outputs, 0, length, axis=axis)
  return outputs, jax.tree.map(lambda x: x.sum(axis=0), sums)
