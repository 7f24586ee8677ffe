"""The network of every block drafter: DFlash's layers, and parts it may have.

Context features (taps -> projection -> norm) are computed once per committed
token and enter every draft layer as keys and values only ("KV injection").
Queries come from the block alone. Block keys and values are transient; only
those of context features persist.
Source: DFlash, arXiv 2602.06036 sections 3-4, and its released model.
"""

import functools
from collections.abc import Callable

import jax
from flax import nnx

from dflash_jax import layers
from dflash_jax.drafters.convolution import DynamicConvolution
from dflash_jax.drafters.correctors import make_confidence, make_corrector
from dflash_jax.networks import DrafterConfig

# (layer, query f32[B, K, N, H], keys and values f32[B, G, K, H] of the block,
# mask bool[B or 1, K, K] of the slots that a slot sees) -> f32[B, K, N, H]:
# what the block sees, of its context and of itself.
Attention = Callable[
  [int, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array
]


class Layer(nnx.Module):
  """A Qwen3-shaped layer; its attention also reads injected context."""

  def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs):
    self.attention_norm = layers.RMSNorm(config.width, config.norm_epsilon)
    self.attention = layers.Projections(
      config.width,
      config.num_heads,
      config.num_kv_heads,
      config.head_width,
      rngs=rngs,
      norm_epsilon=config.norm_epsilon,
    )
    self.mlp_norm = layers.RMSNorm(config.width, config.norm_epsilon)
    self.mlp = layers.SwiGLU(config.width, config.mlp_width, rngs=rngs)

    def convolution() -> DynamicConvolution | None:
      if config.convolution is None:
        return None
      return DynamicConvolution(config.convolution, config.width)

    self.attention_convolution = convolution()
    self.mlp_convolution = convolution()

  def __call__(
    self,
    x: jax.Array,
    angles: jax.Array,
    mask: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array],
  ) -> jax.Array:
    """x f32[B, K, D] -> f32[B, K, D]."""

    def see(normed: jax.Array) -> jax.Array:
      query = self.attention.queries(normed, angles)
      keys_values = self.attention.keys_values(normed, angles)
      key, value = (rows.swapaxes(1, 2) for rows in keys_values)
      return self.attention.merge(attend(query, key, value, mask))

    normed = self.attention_norm(x)
    x = x + _between(self.attention_convolution, normed, see)
    return x + _between(self.mlp_convolution, self.mlp_norm(x), self.mlp)


def _between(
  convolution: DynamicConvolution | None,
  normed: jax.Array,
  sublayer: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """The sublayer between its two convolutions, if it has any."""
  if convolution is None:
    return sublayer(normed)
  before, after = convolution.kernels(normed)
  return convolution.convolve(
    sublayer(convolution.convolve(normed, before)), after
  )


class Network(nnx.Module):
  """Everything a checkpoint of a block drafter holds."""

  def __init__(self, config: DrafterConfig, columns: int, *, rngs: nnx.Rngs):
    """`columns` is V', of the head that correctors correct."""
    tap_width = len(config.target_layer_ids) * config.target_width
    self.context_projection = layers.Linear(tap_width, config.width, rngs=rngs)
    self.context_norm = layers.RMSNorm(config.width, config.norm_epsilon)
    self.layers = nnx.List(
      [Layer(config, rngs=rngs) for _ in range(config.num_layers)]
    )
    self.norm = layers.RMSNorm(config.width, config.norm_epsilon)
    self.corrector = make_corrector(config, columns, rngs=rngs)
    self.confidence = make_confidence(config, rngs=rngs)


@functools.cache
def definition(config: DrafterConfig) -> nnx.GraphDef:
  """What turns a tree of parameters back into a Network."""
  network = nnx.eval_shape(
    lambda: Network(config, config.vocab_size, rngs=nnx.Rngs(0))
  )
  return nnx.split(network)[0]
