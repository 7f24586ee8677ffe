"""What EAGLE-3's layer is made of: fusion of the taps, one layer, a head.

Source: EAGLE-3, arXiv 2503.01840, section 3, and its released model.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax import layers
from dflash_jax.networks import Eagle3Config


class Network(nnx.Module):
  """Fusion of the taps, the layer, the head."""

  def __init__(self, config: Eagle3Config, *, rngs: nnx.Rngs):
    D, epsilon = config.width, config.norm_epsilon
    tap_width = len(config.target_layer_ids) * config.target_width
    self.context_projection = layers.Linear(tap_width, D, rngs=rngs)
    self.embedding_norm = layers.RMSNorm(D, epsilon)
    self.hidden_norm = layers.RMSNorm(D, epsilon)
    self.attention = layers.Projections(
      2 * D,
      config.num_heads,
      config.num_kv_heads,
      config.head_width,
      rngs=rngs,
    )
    merged = config.num_heads * config.head_width
    self.attention.output = layers.Linear(merged, D, rngs=rngs)
    self.mlp_norm = layers.RMSNorm(D, epsilon)
    self.mlp = layers.SwiGLU(D, config.mlp_width, rngs=rngs)
    self.norm = layers.RMSNorm(D, epsilon)
    self.head = layers.Linear(D, config.draft_vocab_size, rngs=rngs)

  def pair(self, embedded: jax.Array, hidden: jax.Array) -> jax.Array:
    """f32[B, T, D] each -> f32[B, T, 2 D], what attention reads."""
    parts = (self.embedding_norm(embedded), self.hidden_norm(hidden))
    return jnp.concatenate(parts, axis=-1)


@functools.cache
def definition(config: Eagle3Config) -> nnx.GraphDef:
  """The network without its parameters, which nnx.merge puts in."""
  network = nnx.eval_shape(lambda: Network(config, rngs=nnx.Rngs(0)))
  return nnx.split(network)[0]
