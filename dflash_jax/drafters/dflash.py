"""DFlash: a whole block of drafts from one pass over mask tokens.

Context features (taps -> projection -> norm) are computed once per committed
token and enter every draft layer as keys and values only ("KV injection").
Queries come from the block alone: the anchor, clean, then K - 1 mask tokens,
each of which predicts the token of its own position. Block keys and values are
transient; only those of context features persist. Context is strictly before
the anchor, whose own target states do not exist yet.
Source: DFlash, arXiv 2602.06036 sections 3-4, and its released model.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax import layers
from dflash_jax.cache import KVCache, Rows
from dflash_jax.config import DrafterConfig
from dflash_jax.drafters.base import Borrowed, Params
from dflash_jax.proposal import (
  Drafting,
  Moment,
  Proposal,
  from_best,
  from_marginals,
)
from pallas_kernels.lm_head_verify import RowStats, lm_head_verify

# (layer, query f32[B, K, N, H]) -> (out f32[B, K, N, H], lse f32[B, K, N])
ContextAttention = Callable[[int, jax.Array], tuple[jax.Array, jax.Array]]


class _Layer(nnx.Module):
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


class _Network(nnx.Module):
  """Everything a DFlash checkpoint holds."""

  def __init__(self, config: DrafterConfig, *, rngs: nnx.Rngs):
    tap_width = len(config.target_layer_ids) * config.target_width
    self.context_projection = layers.Linear(tap_width, config.width, rngs=rngs)
    self.context_norm = layers.RMSNorm(config.width, config.norm_epsilon)
    self.layers = nnx.List(
      [_Layer(config, rngs=rngs) for _ in range(config.num_layers)]
    )
    self.norm = layers.RMSNorm(config.width, config.norm_epsilon)


@functools.cache
def _definition(config: DrafterConfig) -> nnx.GraphDef:
  network = nnx.eval_shape(lambda: _Network(config, rngs=nnx.Rngs(0)))
  return nnx.split(network)[0]


@dataclasses.dataclass(frozen=True)
class DFlash:
  """The DFlash drafter's formulas, bound to one architecture."""

  config: DrafterConfig

  @property
  def taps(self) -> tuple[int, ...]:
    """The target layers it reads."""
    return self.config.target_layer_ids

  @property
  def max_drafts(self) -> int:
    """K - 1: the anchor's slot predicts nothing."""
    return self.config.block_size - 1

  def init(self, key: jax.Array, dtype: str = "float32") -> Params:
    """Random parameters: N(0, 0.02) matrices and unit norms."""
    rngs = nnx.Rngs(params=key)
    params = nnx.to_pure_dict(nnx.state(_Network(self.config, rngs=rngs)))
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

  def count_parameters(self) -> int:
    """Parameters of a checkpoint, counted without allocating any."""
    tree = jax.eval_shape(self.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  # --- Decoding ---------------------------------------------------------------

  def init_state(self, batch: int, capacity: int, dtype: str) -> KVCache:
    """Keys and values of context features: none yet."""
    return KVCache.create(
      num_layers=self.config.num_layers,
      batch=batch,
      num_kv_heads=self.config.num_kv_heads,
      capacity=capacity,
      head_width=self.config.head_width,
      dtype=jnp.dtype(dtype),
    )

  def absorb(
    self,
    params: Params,
    state: KVCache,
    taps: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
  ) -> KVCache:
    """Adds the context keys and values of the tokens the target just read."""
    _, T = tokens.shape
    context = self.context_features(params, taps)
    angles = self._angles(state.positions(T))
    rows = [
      [x.swapaxes(1, 2) for x in layer.attention.keys_values(context, angles)]
      for layer in self._network(params).layers
    ]
    keys, values = zip(*rows, strict=True)
    return state.extend(Rows(keys, values), count)

  def propose(
    self,
    params: Params,
    state: KVCache,
    anchor: jax.Array,
    borrowed: Borrowed,
    drafting: Drafting,
    moment: Moment,
    remaining: jax.Array,
  ) -> Proposal:
    """Drafts from the mask slots, whose laws are independent."""
    hidden = self.draft(
      params, state, anchor, borrowed.embedding, remaining + 1
    )
    depths = self.max_drafts if drafting.is_tree else drafting.num_nodes
    masks = hidden[:, 1 : 1 + depths]
    if drafting.takes_best:
      return from_best(self.read_head(masks, borrowed.head), borrowed.head_ids)
    logits = self.logits(masks, borrowed.head)
    return from_marginals(
      logits, borrowed.head_ids, drafting, moment, self.config.vocab_size
    )

  def draft(
    self,
    params: Params,
    state: KVCache,
    anchor: jax.Array,
    embedding: jax.Array,
    size: jax.Array,
  ) -> jax.Array:
    """One pass over one block per row.

    Args:
      params: the drafter's own.
      state: context of every token before the anchor.
      anchor: i32[B], the last committed token, at position state.length.
      embedding: f[V, D], the target's.
      size: i32[B], slots of the block; the reference shrinks its last block
        to what the budget leaves, and unseen slots change the others.

    Returns:
      f32[B, K, D], each slot after the final norm; those past `size` are void.
    """
    config = self.config
    K = config.block_size
    positions = state.positions(K)
    visible = state.committed_mask()
    slots = jnp.arange(state.capacity, dtype=jnp.int32)
    age = positions[..., None] - slots

    def context_attention(index, query):
      window = config.layer_windows[index]
      mask = visible & (age < window) if window else visible
      mask = jnp.broadcast_to(mask, age.shape)
      return layers.attend_with_lse(query, *state.read(index), mask)

    return self.run_block(
      params,
      self.embed(anchor, embedding),
      positions,
      context_attention,
      exists=jnp.arange(K) < size[:, None],
    )

  # --- Formulas that decoding and training share ------------------------------

  def context_features(self, params: Params, taps: jax.Array) -> jax.Array:
    """taps f32[..., taps * D] -> f32[..., D], computed once per token."""
    network = self._network(params)
    return network.context_norm(network.context_projection(taps))

  def context_keys_values(
    self, params: Params, taps: jax.Array, positions: jax.Array
  ) -> list[tuple[jax.Array, jax.Array]]:
    """Per layer, keys and values f32[B, S, G, H] of tapped tokens."""
    context = self.context_features(params, taps)
    angles = self._angles(positions)
    network = self._network(params)
    return [
      layer.attention.keys_values(context, angles) for layer in network.layers
    ]

  def embed(self, anchor: jax.Array, embedding: jax.Array) -> jax.Array:
    """anchor i32[B] -> f32[B, K, D]: the anchor's row, then mask rows."""
    K = self.config.block_size
    masks = jnp.full((*anchor.shape, K - 1), self.config.mask_token_id)
    tokens = jnp.concatenate([anchor[..., None], masks], axis=-1)
    rows = embedding[tokens].astype(jnp.float32)
    return rows * self.config.input_embedding_scale

  def run_block(
    self,
    params: Params,
    x: jax.Array,
    positions: jax.Array,
    context_attention: ContextAttention,
    exists: jax.Array | None = None,
  ) -> jax.Array:
    """Runs blocks through the draft layers.

    Args:
      params: the drafter's own.
      x: f32[B, K, D], embedded blocks.
      positions: i32[B, K], absolute.
      context_attention: (layer index, query f32[B, K, N, H]) -> out and
        log-sum-exp over the block's visible context, as attend_with_lse gives.
      exists: bool[B, K], slots others may see; all by default.

    Returns:
      f32[B, K, D] after the final norm.
    """
    network = self._network(params)
    angles = self._angles(positions)
    for index, layer in enumerate(network.layers):
      attention = layer.attention
      normed = layer.attention_norm(x)
      query = attention.queries(normed, angles)
      keys_values = attention.keys_values(normed, angles)
      key, value = (x.swapaxes(1, 2) for x in keys_values)
      mask = self._block_mask(index)
      mask = mask if exists is None else mask & exists[:, None]
      block = layers.attend_with_lse(query, key, value, mask)
      context = context_attention(index, query)
      x = x + attention.merge(layers.merge_attention(context, block))
      x = x + layer.mlp(layer.mlp_norm(x))
    return network.norm(x)

  def logits(self, hidden: jax.Array, head: jax.Array) -> jax.Array:
    """hidden f32[..., D] -> f32[..., V'] through columns of the target's head.

    Multiplier first, then the tanh softcap (released model's compute_logits).
    """
    logits = layers.matmul(hidden, head) * self.config.output_multiplier
    cap = self.config.logit_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  def read_head(self, hidden: jax.Array, head: jax.Array) -> RowStats:
    """Of the logits of hidden f32[B, P, D]: rows [B, P], no logits made."""
    stats = lm_head_verify(
      hidden.reshape(-1, hidden.shape[-1]) * self.config.output_multiplier,
      head,
      vocab_axis=1,
      softcap=self.config.logit_softcap,
    )
    return jax.tree.map(lambda row: row.reshape(hidden.shape[:2]), stats)

  def _block_mask(self, index: int) -> jax.Array:
    """bool[1, K, K]: which slots of its own block a slot sees."""
    slots = jnp.arange(self.config.block_size)
    ahead = slots[None, :] - slots[:, None]
    window = self.config.layer_windows[index]
    mask = jnp.ones_like(ahead, bool)
    if self.config.layer_causal[index]:
      mask &= ahead <= 0
    if window:
      mask &= jnp.abs(ahead) < window
    return mask[None]

  def _angles(self, positions: jax.Array) -> jax.Array:
    return layers.rotary_angles(
      positions,
      self.config.head_width,
      self.config.rotary_base,
      self.config.rotary_scaling,
    )

  def _network(self, params: Params) -> _Network:
    return nnx.merge(_definition(self.config), nnx.State(params))
