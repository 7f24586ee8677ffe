"""The target: a decoder-only language model that also reports its taps.

One implementation covers Llama 2/3.x, SmolLM2, Qwen2 (q/k/v bias) and Qwen3
(q/k norm). Layers are unrolled, each with its own parameters: scanning over
stacked layers costs a copy of every layer's weights per pass (measured on a
2-core CPU, 30 layers of SmolLM2's mlp: 1.2x the time at 1 row, 2.4x at 8).
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
from dflash_jax.prediction import Prediction
from dflash_jax.tree import Tree, ancestors
from pallas_kernels.block_attention import block_attention

Params = dict[str, Any]

# (layer, query f32[B, T, N, H], keys and values f[B, G, T, H] of the tokens
# that ask) -> f32[B, T, N, H]: what they see, of themselves and of others.
Attention = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


class _Layer(nnx.Module):
  """Norm, attention, residual; norm, SwiGLU, residual."""

  def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
    self.attention_norm = layers.RMSNorm(config.width, config.norm_epsilon)
    self.attention = layers.Projections(
      config.width,
      config.num_heads,
      config.num_kv_heads,
      config.head_width,
      rngs=rngs,
      bias=config.qkv_bias,
      norm_epsilon=config.norm_epsilon if config.qk_norm else None,
    )
    self.mlp_norm = layers.RMSNorm(config.width, config.norm_epsilon)
    self.mlp = layers.SwiGLU(config.width, config.mlp_width, rngs=rngs)

  def __call__(
    self,
    x: jax.Array,
    angles: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
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
    x = x + self.attention.merge(attend(query, key, value))
    return x + self.mlp(self.mlp_norm(x)), key, value


class _Network(nnx.Module):
  """Embedding, layers, final norm, head."""

  def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
    self.embedding = layers.normal(rngs, (config.vocab_size, config.width))
    self.layers = nnx.List(
      [_Layer(config, rngs=rngs) for _ in range(config.num_layers)]
    )
    self.norm = layers.RMSNorm(config.width, config.norm_epsilon)
    self.head = layers.Linear(config.width, config.vocab_size, rngs=rngs)


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
    """Random parameters, N(0, 0.02) matrices and unit norms."""
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
      seen = None
    else:
      depths = jnp.pad(tree.depths, ((0, 0), (1, 0)))
      positions = cache.length[:, None] + depths
      seen = ancestors(tree)

    def attend(layer, query, key, value):
      past = (*cache.read(layer), cache.own_length)
      return block_attention(
        query,
        key,
        value,
        *past,
        seen,
        prefix=cache.read_trunk(layer),
        member=cache.member,
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
    angles = layers.rotary_angles(
      positions,
      self.config.head_width,
      self.config.rotary_base,
      self.config.rotary_scaling,
    )
    x = network.embedding[tokens].astype(jnp.float32)
    outputs, keys, values = {}, [], []
    for index, layer in enumerate(network.layers):
      x, key, value = layer(x, angles, functools.partial(attend, index), dtype)
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
