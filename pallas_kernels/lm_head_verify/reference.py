"""lm_head_verify in plain XLA: the truth, and what runs without a kernel."""

import jax
import jax.numpy as jnp

from pallas_kernels.lm_head_verify.row_stats import LOWEST, Draws, RowStats
from pallas_kernels.noise import race_times

TILE = 128  # logits per block of the two-level argmax


def lm_head_verify(
  hidden: jax.Array,
  head: jax.Array,
  tokens: jax.Array | None,
  draws: Draws | None,
  *,
  vocab_axis: int,
  softcap: float | None,
) -> RowStats:
  """As the public operation; logits are made, and reduced."""
  logits = logits_of(hidden, head, vocab_axis=vocab_axis, softcap=softcap)
  best = argmax(logits)
  ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
  top = logits.max(axis=-1)
  others = jnp.where(ids == best[:, None], LOWEST, logits)
  given = None
  if tokens is not None:
    given = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
  return RowStats(
    best=best,
    top=top,
    margin=top - others.max(axis=-1),
    logsumexp=jax.nn.logsumexp(logits, axis=-1),
    given=given,
    sample=None if draws is None else sample(logits, draws),
  )


def logits_of(
  hidden: jax.Array, head: jax.Array, *, vocab_axis: int, softcap: float | None
) -> jax.Array:
  """f32[M, V]; operands take the head's dtype, sums are float32."""
  exact = head.dtype == jnp.float32
  logits = jax.lax.dot_general(
    hidden.astype(head.dtype),
    head,
    (((1,), (1 - vocab_axis,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def argmax(logits: jax.Array) -> jax.Array:
  """logits f32[..., V] -> i32[...], the lowest id among the largest.

  The largest block of TILE logits first, then its largest entry: one plain
  maximum over the vocabulary. jnp.argmax carries (value, index) pairs through
  all of it, which costs a CPU 60 times as much (128 rows of 49,152: 0.9 ms
  against 57).
  """
  *rows, V = logits.shape
  if V % TILE:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  tiles = logits.reshape(*rows, V // TILE, TILE)
  best = jnp.argmax(tiles.max(axis=-1), axis=-1)
  tile = jnp.take_along_axis(tiles, best[..., None, None], axis=-2)[..., 0, :]
  return (best * TILE + jnp.argmax(tile, axis=-1)).astype(jnp.int32)


def sample(logits: jax.Array, draws: Draws) -> jax.Array:
  """i32[M]: argmax of logit / temperature - log(race time).

  The logarithm of exp(logit / temperature) / race time: one per address, where
  the exponential would be one per row.
  """
  top = logits.max(axis=-1, keepdims=True)
  times = race_times(draws.stream, draws.seeds, draws.moments, logits.shape[-1])
  gumbel = -jnp.log(times)
  if draws.addresses is not None:
    # A gather that takes the noise's making along makes it once for each row.
    gumbel = jax.lax.optimization_barrier(gumbel)[draws.addresses]
  return argmax((logits - top) / draws.temperature + gumbel)
