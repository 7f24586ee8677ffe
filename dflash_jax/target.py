"""The target: a decoder-only language model that also reports its taps.

One implementation covers Llama 2/3.x, SmolLM2, Qwen2, Qwen3, Qwen3-MoE, gpt-oss
and Gemma 3; docs/targets.md says in what they differ. Layers are unrolled, each
with its own parameters: scanning over stacked layers costs a copy of every
layer's weights per pass (measured on a 2-core CPU, 30 layers of SmolLM2's mlp:
1.2x the time at 1 row, 2.4x at 8).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax import layers
from dflash_jax.cache import KVCache, Rows
from dflash_jax.config import TargetConfig
from dflash_jax.experts import Experts
from dflash_jax.prediction import Prediction
from dflash_jax.tree import Tree, ancestors
from pallas_kernels.block_attention import block_attention

Params = dict[str, Any]

# (layer, query f32[B, T, N, H], keys and values f[B, G, T, H] of the tokens
# that ask, sinks f[N] or None) -> f32[B, T, N, H]: what they see, of themselves
# and of others.
Attention = Callable[
  [int, jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array
]


class _Layer(nnx.Module):
  """Norm, attention, residual; norm, mlp or experts, residual."""

  def __init__(self, config: TargetConfig, index: int, *, rngs: nnx.Rngs):
    def norm() -> layers.RMSNorm:
      return layers.RMSNorm(
        config.width, config.norm_epsilon, config.unit_offset
      )

    self.attention_norm = norm()
    self.attention = layers.Projections(
      config.width,
      config.num_heads,
      config.num_kv_heads,
      config.head_width,
      rngs=rngs,
      bias=config.qkv_bias,
      output_bias=config.output_bias,
      norm_epsilon=config.norm_epsilon if config.qk_norm else None,
      unit_offset=config.unit_offset,
      sinks=config.attention_sinks,
      score_scale=config.score_scale,
    )
    self.attention_post_norm = norm() if config.post_norms else None
    self.mlp_norm = norm()
    self.mlp = (
      Experts(config, rngs=rngs)
      if config.has_experts(index)
      else layers.SwiGLU(
        config.width, config.mlp_width, rngs=rngs, opening=config.gate
      )
    )
    self.mlp_post_norm = norm() if config.post_norms else None

  def __call__(
    self,
    x: jax.Array,
    angles: jax.Array,
    attend: Callable[
      [jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array
    ],
    dtype: jnp.dtype,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of x f32[B, T, D], and the keys and values f[B, G, T, H] of its tokens.

    `attend` is Attention of this layer; `dtype` that of keys and values.
    """
    normed = self.attention_norm(x)
    query = self.attention.queries(normed, angles)
    key, value = (
      rows.swapaxes(1, 2).astype(dtype)
      for rows in self.attention.keys_values(normed, angles)
    )
    sinks = self.attention.sinks
    attended = attend(query, key, value, None if sinks is None else sinks[...])
    x = x + _after(self.attention.merge(attended), self.attention_post_norm)
    x = x + _after(self.mlp(self.mlp_norm(x)), self.mlp_post_norm)
    return x, key, value


def _after(x: jax.Array, norm: layers.RMSNorm | None) -> jax.Array:
  return x if norm is None else norm(x)


class _Network(nnx.Module):
  """Embedding, layers, final norm, head."""

  def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
    self.embedding = layers.normal(rngs, (config.vocab_size, config.width))
    self.layers = nnx.List(
      [_Layer(config, i, rngs=rngs) for i in range(config.num_layers)]
    )
    self.norm = layers.RMSNorm(
      config.width, config.norm_epsilon, config.unit_offset
    )
    self.head = layers.Linear(config.width, config.vocab_size, rngs=rngs)

  def embed(self, tokens: jax.Array, scale: float) -> jax.Array:
    """tokens i32[B, T] -> f32[B, T, D]; the scale rounds as the rows do."""
    rows = self.embedding[tokens]
    if scale == 1.0:
      return rows.astype(jnp.float32)
    rounded = jnp.asarray(scale, rows.dtype).astype(jnp.float32)
    return rows.astype(jnp.float32) * rounded


@functools.cache
def _definition(config: TargetConfig) -> nnx.GraphDef:
  network = nnx.eval_shape(lambda: _Network(config, rngs=nnx.Rngs(0)))
  return nnx.split(network)[0]


@dataclasses.dataclass(frozen=True)
class Target:
  """The target's formulas, bound to one architecture.

  Static and hashable; parameters are plain nested dicts, given to each call.
  Matmul weights are stored [in, out], the layout a CPU's small-batch matmul
  reads fastest, the head included (a tied head is a transposed copy).
  """

  config: TargetConfig

  def init(self, key: jax.Array, dtype: str = "float32") -> Params:
    """Random parameters: N(0, 0.02) matrices, unit norms, zero biases."""
    rngs = nnx.Rngs(params=key)
    params = nnx.to_pure_dict(nnx.state(_Network(self.config, rngs=rngs)))
    if self.config.tied_head:
      params["head"]["kernel"] = params["embedding"].T
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

  def init_cache(
    self, batch: int, capacity: int, dtype: str = "float32"
  ) -> KVCache:
    """An empty cache for `batch` rows of at most `capacity` tokens."""
    return KVCache.create(
      num_layers=self.config.num_layers,
      batch=batch,
      num_kv_heads=self.config.num_kv_heads,
      capacity=capacity,
      head_width=self.config.head_width,
      dtype=jnp.dtype(dtype),
    )

  def forward(
    self,
    params: Params,
    tokens: jax.Array,
    cache: KVCache,
    taps: tuple[int, ...] = (),
    tree: Tree | None = None,
  ) -> tuple[jax.Array, jax.Array, Rows]:
    """Reads the next tokens of each row.

    Args:
      params: as `init` or weights.load_target gives them.
      tokens: i32[B, T], at positions cache.length + 0..T-1; with a tree, the
        anchor and its nodes, at cache.length + depth.
      cache: committed tokens before them.
      taps: layers whose output is wanted, in order.
      tree: of T - 1 nodes, each of which sees its ancestors alone.

    Returns:
      hidden f32[B, T, D] after the final norm, the taps f32[B, T, taps * D]
      side by side, and the rows that `cache.extend` commits.
    """
    _, T = tokens.shape
    if tree is None:
      positions = cache.positions(T)
      depths = None
    else:
      depths = jnp.pad(tree.depths, ((0, 0), (1, 0)))
      positions = cache.length[:, None] + depths
    windows = {self.config.window(i) for i in range(self.config.num_layers)}
    seen = {
      window: None if tree is None else ancestors(tree, window)
      for window in windows
    }

    def attend(layer, query, key, value, sinks):
      past = (*cache.read(layer), cache.own_length)
      window = self.config.window(layer)
      return block_attention(
        query,
        key,
        value,
        *past,
        seen[window],
        depths=depths if window else None,
        prefix=cache.read_trunk(layer),
        member=cache.member,
        window=window,
        sinks=sinks,
      )

    return self.run(params, tokens, positions, attend, cache.dtype, taps)

  def run(
    self,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attention,
    dtype: jnp.dtype,
    taps: tuple[int, ...] = (),
  ) -> tuple[jax.Array, jax.Array, Rows]:
    """`forward`, for a caller that knows what each token sees.

    Args:
      params, tokens, taps: as in `forward`.
      positions: i32[B, T].
      attend: of each layer.
      dtype: of keys and values.
    """
    network = nnx.merge(_definition(self.config), nnx.State(params))
    angles = self._angles(positions)
    x = network.embed(tokens, self.config.embedding_scale)
    outputs, keys, values = {}, [], []
    for index, layer in enumerate(network.layers):
      x, key, value = layer(
        x,
        angles[self.config.window(index) is not None],
        functools.partial(attend, index),
        dtype,
      )
      keys.append(key)
      values.append(value)
      if index in taps:
        outputs[index] = x
    tapped = [outputs[tap] for tap in taps]
    states = jnp.concatenate(tapped, axis=-1) if taps else x[..., :0]
    # The rows wait for the end of the pass, and so does whoever writes them: a
    # buffer that might be written while it is still read would be copied.
    hidden, rows = jax.lax.optimization_barrier(
      (network.norm(x), Rows(tuple(keys), tuple(values)))
    )
    return hidden, states, rows

  def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of layers that see everything, and of those with a window."""
    config = self.config
    everywhere = layers.rotary_angles(
      positions, config.head_width, config.rotary_base, config.rotary_scaling
    )
    if config.local_rotary_base is None:
      return everywhere, everywhere
    local = layers.rotary_angles(
      positions, config.head_width, config.local_rotary_base, None
    )
    return everywhere, local

  def normalize(self, params: Params, output: jax.Array) -> jax.Array:
    """The last layer's output f[..., D] -> hidden f32[..., D] for `logits`."""
    network = nnx.merge(_definition(self.config), nnx.State(params))
    return network.norm(output)

  def predict(self, params: Params, hidden: jax.Array) -> Prediction:
    """What hidden f32[B, T, D] after the final norm says of the next tokens."""
    return Prediction(hidden, params["head"]["kernel"])

  def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
    """hidden f32[..., D] after the final norm -> f32[..., V]."""
    return self.predict(params, hidden).logits()
