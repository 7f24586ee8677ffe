"""The parts both networks are made of: norm, rotary, attention, SwiGLU.

Modules say what parameters they own in `__init__` and are a formula in
`__call__`; they hold no cache and no random state. The residual stream, norms
and softmax are float32. Matmul operands take the dtype of the kernel, so one
set of formulas serves float32, where "lossless" is defined, and bfloat16. A
kernel may also stand there in 8 bits, see fp8.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dflash_jax.config import RotaryScaling
from dflash_jax.fp8 import QuantizedKernel
from dflash_jax.target_network import Gate

INIT_STDDEV = 0.02  # training.md 1.1: all DFlash matrices start at N(0, 0.02)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...]) -> nnx.Param:
  """A float32 parameter drawn from N(0, 0.02)."""
  return nnx.Param(INIT_STDDEV * jax.random.normal(rngs.params(), shape))


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, over the last axis, in float32.

  With `unit_offset` times 1 + scale: so Gemma's files store it, and bfloat16
  holds a scale near 0 that it would round away beside a 1.
  """

  def __init__(self, width: int, epsilon: float, unit_offset: bool = False):
    first = jnp.zeros if unit_offset else jnp.ones
    self.scale = nnx.Param(first((width,)))
    self.epsilon = epsilon
    self.unit_offset = unit_offset

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    unit = x * jax.lax.rsqrt(mean_square + self.epsilon)
    scale = self.scale[...].astype(jnp.float32)
    return unit * (1.0 + scale if self.unit_offset else scale)


class Linear(nnx.Module):
  """x @ kernel (+ bias); the kernel is stored [in, out]."""

  def __init__(
    self, width_in: int, width_out: int, *, rngs: nnx.Rngs, bias: bool = False
  ):
    self.kernel = normal(rngs, (width_in, width_out))
    self.bias = nnx.Param(jnp.zeros((width_out,))) if bias else None

  def __call__(self, x: jax.Array) -> jax.Array:
    y = matmul(x, self.kernel.get_value())
    return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


def matmul(x: jax.Array, kernel: jax.Array | QuantizedKernel) -> jax.Array:
  """x f[..., I] @ kernel f[I, O] -> f32[..., O].

  Operands take the kernel's dtype, forward and backward; sums are float32.
  Float32 asks for full float32 products: on GPUs the default would be TF32,
  whose rounding makes the 1-token and the K-token pass of a target disagree.
  A kernel in 8 bits rounds x to 8 bits too, and has no gradient.
  """
  if isinstance(kernel, QuantizedKernel):
    return kernel.multiply(x)
  return _multiply(x, kernel)


@jax.custom_vjp
def _multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return _dot(x.astype(kernel.dtype), kernel)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
  exact = y.dtype == jnp.float32
  return jnp.dot(
    x,
    y,
    precision=jax.lax.Precision.HIGHEST if exact else None,
    preferred_element_type=jnp.float32,
  )


def _multiply_forward(x, kernel):
  return _multiply(x, kernel), (x, kernel)


def _multiply_backward(saved, gradient):
  x, kernel = saved
  rows = x.astype(kernel.dtype).reshape(-1, x.shape[-1])
  gradient = gradient.astype(kernel.dtype)
  x_gradient = _dot(gradient, kernel.T).astype(x.dtype)
  kernel_gradient = _dot(rows.T, gradient.reshape(rows.shape[0], -1))
  return x_gradient, kernel_gradient.astype(kernel.dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x)), or as another Gate opens."""

  def __init__(
    self,
    width: int,
    mlp_width: int,
    *,
    rngs: nnx.Rngs,
    opening: Gate = Gate(),  # noqa: B008
  ):
    self.gate = Linear(width, mlp_width, rngs=rngs)
    self.up = Linear(width, mlp_width, rngs=rngs)
    self.down = Linear(mlp_width, width, rngs=rngs)
    self.opening = opening

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(open_gate(self.opening, self.gate(x), self.up(x)))


def open_gate(opening: Gate, gate: jax.Array, up: jax.Array) -> jax.Array:
  """gate, up f32[..., F] -> f32[..., F]; see Gate."""
  if opening.kind == "silu":
    return jax.nn.silu(gate) * up
  if opening.kind == "gelu_tanh":
    return jax.nn.gelu(gate, approximate=True) * up
  gate = jnp.minimum(gate, opening.limit)
  up = jnp.clip(up, -opening.limit, opening.limit)
  return gate * jax.nn.sigmoid(opening.slope * gate) * (up + 1.0)


class Projections(nnx.Module):
  """q, k, v and output projections of grouped-query attention.

  Queries f32[B, T, N, H], keys and values f32[B, T, G, H]; q and k optionally
  pass a per-head RMSNorm before rotary (Qwen3, and every DFlash drafter).
  Queries carry what the scores' scale has beyond 1 / sqrt(H), so that whoever
  attends need not know of it. Sinks are f32[N], see `apply_sinks`.
  """

  def __init__(
    self,
    width: int,
    num_heads: int,
    num_kv_heads: int,
    head_width: int,
    *,
    rngs: nnx.Rngs,
    bias: bool = False,
    output_bias: bool = False,
    norm_epsilon: float | None = None,
    unit_offset: bool = False,
    sinks: bool = False,
    score_scale: float | None = None,
  ):
    kv_width = num_kv_heads * head_width
    self.head_width = head_width
    self.query = Linear(width, num_heads * head_width, rngs=rngs, bias=bias)
    self.key = Linear(width, kv_width, rngs=rngs, bias=bias)
    self.value = Linear(width, kv_width, rngs=rngs, bias=bias)
    self.output = Linear(
      num_heads * head_width, width, rngs=rngs, bias=output_bias
    )
    self.sinks = nnx.Param(jnp.zeros((num_heads,))) if sinks else None
    self.score_scale = score_scale

    def head_norm() -> RMSNorm | None:
      if norm_epsilon is None:
        return None
      return RMSNorm(head_width, norm_epsilon, unit_offset)

    self.query_norm, self.key_norm = head_norm(), head_norm()

  def queries(self, x: jax.Array, angles: jax.Array) -> jax.Array:
    """x f[B, T, D], angles f32[2, B, T, H/2] -> f32[B, T, N, H]."""
    q = self._heads(self.query(x))
    q = q if self.query_norm is None else self.query_norm(q)
    if self.score_scale is not None:
      q = q * (self.score_scale * math.sqrt(self.head_width))
    return rotate(q, angles)

  def keys_values(
    self, x: jax.Array, angles: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """x f[B, T, D] -> rotated keys and plain values, f32[B, T, G, H] each."""
    k = self._heads(self.key(x))
    k = k if self.key_norm is None else self.key_norm(k)
    return rotate(k, angles), self._heads(self.value(x))

  def merge(self, attended: jax.Array) -> jax.Array:
    """attended f[B, T, N, H] -> f32[B, T, D]."""
    return self.output(attended.reshape(*attended.shape[:-2], -1))

  def _heads(self, x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, self.head_width)


# --- Attention ----------------------------------------------------------------


def _group(query: jax.Array, num_kv_heads: int) -> jax.Array:
  """f32[B, T, N, H] -> f32[B, G, N / G * T, H], rows of each kv head."""
  B, T, N, H = query.shape
  G = num_kv_heads
  grouped = query.reshape(B, T, G, N // G, H).transpose(0, 2, 3, 1, 4)
  return grouped.reshape(B, G, (N // G) * T, H)


def _ungroup(out: jax.Array, count: int) -> jax.Array:
  """f32[B, G, N / G * T, H] -> f32[B, T, N, H]."""
  B, G, rows, H = out.shape
  out = out.reshape(B, G, rows // count, count, H).transpose(0, 3, 1, 2, 4)
  return out.reshape(B, count, -1, H)


def _scores(grouped: jax.Array, key: jax.Array) -> jax.Array:
  return jnp.einsum(
    "BGQH,BGSH->BGQS",
    grouped.astype(key.dtype),
    key,
    precision=_precision(key),
    preferred_element_type=jnp.float32,
  )


def _weighted(weights: jax.Array, value: jax.Array) -> jax.Array:
  return jnp.einsum(
    "BGQS,BGSH->BGQH",
    weights.astype(value.dtype),
    value,
    precision=_precision(value),
    preferred_element_type=jnp.float32,
  )


def _precision(operand: jax.Array) -> jax.lax.Precision | None:
  exact = operand.dtype == jnp.float32
  return jax.lax.Precision.HIGHEST if exact else None


def attend_with_lse(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Attention with one mask, and each query's log-sum-exp f32[B, T, N].

  Two attentions over disjoint keys merge exactly through their log-sum-exp
  (`merge_attention`), which spares a mask over their union.
  """
  B, T, N, H = query.shape
  _, G, S, _ = key.shape
  scores = _scores(_group(query, G), key)
  scores = scores.reshape(B, G, N // G, T, S) / math.sqrt(H)
  scores = jnp.where(mask[:, None, None], scores, -1e30)
  top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
  weights = jnp.exp(scores - top)
  total = weights.sum(axis=-1, keepdims=True)
  out = _weighted((weights / total).reshape(B, G, -1, S), value)
  lse = (jnp.log(total) + top)[..., 0].transpose(0, 3, 1, 2)
  return _ungroup(out, T), lse.reshape(B, T, N)


def merge_attention(
  first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> jax.Array:
  """Attention over the union of two disjoint key sets.

  Args:
    first, second: (out f32[..., N, H], lse f32[..., N]) of `attend_with_lse`.

  Returns:
    f32[..., N, H]: each part weighted by its share of the softmax's total.
  """
  (out_a, lse_a), (out_b, lse_b) = first, second
  share = jax.nn.sigmoid(lse_a - lse_b)[..., None]
  return share * out_a + (1.0 - share) * out_b


def apply_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> jax.Array:
  """Attention that loses to each head's sink its share of the softmax.

  A sink is the score of one more key, whose value is 0. Once, of the attention
  over all keys: parts that are merged have one sink together.

  Args:
    out, lse: f32[..., N, H] and f32[..., N], as of `attend_with_lse`.
    sinks: f[N].
  """
  share = jax.nn.sigmoid(lse - sinks.astype(jnp.float32))
  return out * share[..., None]


# --- Rotary embedding ---------------------------------------------------------


def rotary_frequencies(
  head_width: int, base: float, scaling: RotaryScaling | None
) -> tuple[np.ndarray, float]:
  """Inverse frequencies f32[H/2], and the factor on cos and sin."""
  exponent = np.arange(0, head_width, 2, dtype=np.float64) / head_width
  frequencies = base**-exponent
  factor = 1.0
  if scaling is not None and scaling.kind == "llama3":
    frequencies = _llama3_frequencies(frequencies, scaling)
  elif scaling is not None and scaling.kind == "linear":
    frequencies = frequencies / scaling.factor
  elif scaling is not None:
    frequencies = _yarn_frequencies(frequencies, base, scaling)
    factor = 0.1 * math.log(scaling.factor) + 1.0
    if scaling.attention_factor is not None:
      factor = scaling.attention_factor
  return frequencies.astype(np.float32), factor


def _llama3_frequencies(
  frequencies: np.ndarray, scaling: RotaryScaling
) -> np.ndarray:
  """Divides slow frequencies by the factor, ramping between two bounds."""
  rotations = scaling.original_length * frequencies / (2 * math.pi)
  low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
  keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
  return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn_frequencies(
  frequencies: np.ndarray, base: float, scaling: RotaryScaling
) -> np.ndarray:
  """YaRN's ramp over frequency index (arXiv 2309.00071, section 3.2)."""
  half = len(frequencies)

  def index_at(rotations: float) -> float:
    span = scaling.original_length / (rotations * 2 * math.pi)
    return half * math.log(span) / math.log(base)

  low, high = index_at(scaling.beta_fast), index_at(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * half - 1)
  slow = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0.0, 1.0)
  return slow * frequencies / scaling.factor + (1 - slow) * frequencies


def rotary_angles(
  positions: jax.Array,
  head_width: int,
  base: float,
  scaling: RotaryScaling | None,
) -> jax.Array:
  """positions i32[B, T] -> cos and sin, f32[2, B, T, H/2]."""
  frequencies, factor = rotary_frequencies(head_width, base, scaling)
  angles = positions.astype(jnp.float32)[..., None] * frequencies
  return factor * jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
  """Rotates pairs (i, i + H/2) of x f32[B, T, heads, H]."""
  cos, sin = angles[0][..., None, :], angles[1][..., None, :]
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
