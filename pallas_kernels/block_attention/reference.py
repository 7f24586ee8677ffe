"""block_attention in plain XLA: the truth, and what runs without a kernel."""

import math

import jax
import jax.numpy as jnp
import numpy as np

HIDDEN = -1e30  # score of a key that a row does not see
WORD = 32  # bits of a word of `ancestors`

Prefix = tuple[jax.Array, jax.Array, jax.Array]


def block_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  past_key: jax.Array,
  past_value: jax.Array,
  length: jax.Array,
  ancestors: jax.Array | None,
  *,
  prefix: Prefix | None,
  member: jax.Array | None = None,
  window: int | None,
  scale: float | None,
  depths: jax.Array | None = None,
  sinks: jax.Array | None = None,
) -> jax.Array:
  """As the public operation: all scores, one softmax, the weighted values."""
  B, P, N, H = query.shape
  G = key.shape[1]
  grouped = query.reshape(B, P, G, N // G, H).transpose(0, 2, 3, 1, 4)
  grouped = grouped.reshape(B, G, (N // G) * P, H)
  oldest = oldest_visible(P, length, window, depths)
  parts = [
    (past_key, past_value, _visible(past_key, length, oldest)),
    (key, value, block_mask(P, ancestors, window)),
  ]
  if prefix is not None:
    prefix_key, prefix_value, prefix_length = prefix
    if oldest is not None:
      oldest = prefix_length + oldest
    mask = _visible(prefix_key, jnp.reshape(prefix_length, (1,)), oldest)
    if member is not None:
      mask = mask & member[:, None, None]
    parts.insert(0, (prefix_key, prefix_value, mask))

  def score(part_key, mask):
    scores = _scores(grouped, part_key).reshape(B, G, N // G, P, -1)
    scores = scores / math.sqrt(H) if scale is None else scores * scale
    return jnp.where(mask[:, None, None], scores, HIDDEN)

  scores = [score(part_key, mask) for part_key, _, mask in parts]
  if sinks is not None:  # the last column, of a key whose value is 0
    column = sinks.astype(jnp.float32).reshape(G, N // G, 1, 1)
    scores.append(jnp.broadcast_to(column, (B, G, N // G, P, 1)))
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1)
  weights = weights.reshape(B, G, (N // G) * P, -1)
  out, first = jnp.zeros((), jnp.float32), 0
  for part_key, part_value, _ in parts:
    count = part_key.shape[-2]
    out = out + _weighted(weights[..., first : first + count], part_value)
    first += count
  out = out.reshape(B, G, N // G, P, H).transpose(0, 3, 1, 2, 4)
  return out.reshape(B, P, N, H)


def oldest_visible(
  num_tokens: int,
  length: jax.Array,
  window: int | None,
  depths: jax.Array | None = None,
) -> jax.Array | None:
  """i32[B, P]: the first cache slot that a row sees; negative: in a prefix."""
  if window is None:
    return None
  if depths is None:
    depths = jnp.arange(num_tokens, dtype=jnp.int32)
  return length[:, None] + depths + (1 - window)


def block_mask(
  num_tokens: int, ancestors: jax.Array | None, window: int | None
) -> jax.Array:
  """bool[B or 1, P, P]: which new keys each row sees."""
  columns = np.arange(num_tokens)
  if ancestors is not None:
    shifts = (columns % WORD).astype(np.uint32)
    return ((ancestors[..., columns // WORD] >> shifts) & 1) == 1
  behind = columns[:, None] - columns
  seen = (behind >= 0) & (behind < (window or num_tokens))
  return jnp.asarray(seen[None])


def pack_mask(seen: jax.Array) -> jax.Array:
  """seen bool[B, P, P], which new keys each row sees -> u32[B, P, W]."""
  batch, rows, columns = seen.shape
  seen = jnp.pad(seen, ((0, 0), (0, 0), (0, -columns % WORD)))
  words = seen.reshape(batch, rows, -1, WORD).astype(jnp.uint32)
  words = words << np.arange(WORD, dtype=np.uint32)
  return words.sum(axis=-1, dtype=jnp.uint32)


def _visible(
  key: jax.Array, length: jax.Array, oldest: jax.Array | None
) -> jax.Array:
  """bool[B or 1, P or 1, S]: which slots of a part each row sees."""
  slots = jnp.arange(key.shape[-2])
  seen = (slots < length[:, None])[:, None]
  return seen if oldest is None else seen & (slots >= oldest[..., None])


def _scores(grouped: jax.Array, key: jax.Array) -> jax.Array:
  """f32[B, G, Q, S]; a key without a batch axis serves all of it."""
  return jnp.einsum(
    "BGQH,BGSH->BGQS" if key.ndim == 4 else "BGQH,GSH->BGQS",
    grouped.astype(key.dtype),
    key,
    precision=_precision(key),
    preferred_element_type=jnp.float32,
  )


def _weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
  return jnp.einsum(
    "BGQS,BGSH->BGQH" if value.ndim == 4 else "BGQS,GSH->BGQH",
    weights.astype(value.dtype),
    value,
    precision=_precision(value),
    preferred_element_type=jnp.float32,
  )


def _precision(operand: jax.Array) -> jax.lax.Precision | None:
  """Full float32 products where operands are float32; TF32 would differ."""
  exact = operand.dtype == jnp.float32
  return jax.lax.Precision.HIGHEST if exact else None
