"""The head's product and all that verification asks of it, in one pass."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.devices import Device
from pallas_kernels.lm_head_verify import (
  kernel_sm90,
  kernel_sm100,
  reference,
  tiles,
)
from pallas_kernels.lm_head_verify.config import Config, choose_config
from pallas_kernels.lm_head_verify.row_stats import Draws, RowStats, merge

NAME = "lm_head_verify"
COPIED_ROWS = 8  # what a copy engine takes at a time
KERNELS = {
  "sm90": kernel_sm90.partial_stats,
  "sm100": kernel_sm100.partial_stats,
}


def lm_head_verify(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array | None = None,
  draws: Draws | None = None,
  *,
  vocab_axis: int = 0,
  softcap: float | None = None,
  implementation: str | None = None,
) -> RowStats:
  """Statistics of softcap(hidden @ head), per row.

  Greedy, coupled and one-hot verification need nothing else. The kernels never
  write logits to memory.

  Args:
    hidden: f[M, D], after the final norm.
    head: f[V, D] for vocab_axis=0, as tied embeddings are stored; else f[D, V].
    tokens: i32[M], whose logits are asked for, or None.
    draws: noise of one draw per row from softmax(logits / temperature).
    vocab_axis: 0 or 1.
    softcap: c in c tanh(logits / c).
    implementation: None for the fastest, or a name in dispatch.IMPLEMENTATIONS.

  Raises:
    ValueError: arguments that no implementation takes.
    NotImplementedError: an implementation that cannot run here, or not on them.
  """
  _check(hidden, head, tokens, draws, vocab_axis, softcap)
  limit = _kernel_limit(hidden, head)
  chosen, device = dispatch.choose(NAME, implementation, limit)
  if chosen == "xla":
    return reference.lm_head_verify(
      hidden, head, tokens, draws, vocab_axis=vocab_axis, softcap=softcap
    )
  with jax.named_scope(NAME):
    return run_kernel(
      chosen,
      device,
      hidden,
      head,
      tokens,
      draws,
      vocab_axis=vocab_axis,
      softcap=softcap,
    )


def run_kernel(
  architecture: str,
  device: Device,
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array | None,
  draws: Draws | None,
  *,
  vocab_axis: int,
  softcap: float | None,
  config: Config | None = None,
  interpret: object = None,
) -> RowStats:
  """Pads rows, runs a kernel, and merges what its CTAs found."""
  M = hidden.shape[0]
  draws = draws and draws.spread()
  config = config or choose_config(architecture, M, draws=draws is not None)
  work = tiles.Work.cut(
    M,
    head.shape,
    draws,
    asks=tokens is not None,
    vocab_axis=vocab_axis,
    softcap=softcap,
    config=config,
    num_ctas=device.num_cores,
  )
  # The copy engine fills up a tile with zeros, from whole eights on.
  rows = jnp.pad(hidden.astype(head.dtype), ((0, -M % COPIED_ROWS), (0, 0)))
  parts = KERNELS[architecture](
    work, rows, head, tiles.addresses(work, tokens, draws), interpret
  )
  return jax.tree.map(lambda x: x[:M], merge(parts))


def _check(hidden, head, tokens, draws, vocab_axis, softcap) -> None:
  """Raises ValueError for what nobody could compute."""

  def refuse(what: str):
    raise ValueError(f"{NAME}: {what}")

  if vocab_axis not in (0, 1):
    refuse(f"vocab_axis={vocab_axis}; use 0 for [V, D], 1 for [D, V]")
  if hidden.ndim != 2 or head.ndim != 2:
    refuse(f"hidden {hidden.shape} and head {head.shape} must have 2 axes")
  M, D = hidden.shape
  if head.shape[1 - vocab_axis] != D:
    refuse(
      f"hidden {hidden.shape} and head {head.shape} with vocab_axis="
      f"{vocab_axis} differ in width"
    )
  if not M or not D or not head.size:
    refuse(f"hidden {hidden.shape} or head {head.shape} is empty")
  for name, array in (("hidden", hidden), ("head", head)):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      refuse(f"{name} is {array.dtype}; use a floating-point type")
  rows = {"tokens": tokens}
  if draws is not None:
    if draws.addresses is None:
      rows |= {"draws.seeds": draws.seeds, "draws.moments": draws.moments}
    elif draws.seeds.shape != draws.moments.shape or draws.seeds.ndim != 1:
      refuse(
        f"draws.seeds has shape {draws.seeds.shape}, draws.moments "
        f"{draws.moments.shape}; both hold one number per address"
      )
    rows["draws.addresses"] = draws.addresses
    if not draws.temperature > 0:
      refuse(f"draws.temperature={draws.temperature}; use more than 0")
    if draws.seeds.dtype != jnp.uint32:
      refuse(f"draws.seeds is {draws.seeds.dtype}; use uint32")
  for name, array in rows.items():
    if array is not None and array.shape != (M,):
      refuse(f"{name} has shape {array.shape}; hidden has {M} rows")
  if softcap is not None and not softcap > 0:
    refuse(f"softcap={softcap}; use more than 0, or None")


def _kernel_limit(hidden: jax.Array, head: jax.Array) -> str | None:
  """Why kernels cannot take these arguments, if so."""
  if head.dtype != jnp.bfloat16:
    return f"kernels take a bfloat16 head, not {head.dtype}"
  width = hidden.shape[1]
  if head.shape[0] % 8 or head.shape[1] % 64 or width % 64:
    return (
      f"kernels copy tiles of 8 x 64, of which width {width} and head "
      f"{head.shape} are no multiples"
    )
  return None
