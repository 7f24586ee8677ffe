"""DFlash: a whole block of drafts from one pass over mask tokens.

A block is the anchor, clean, then K - 1 mask tokens, each of which predicts
the token of its own position; where the anchor predicts too, every slot
predicts the token after its own. Context is strictly before the anchor, whose
own target states do not exist yet. DFlash 2, DSpark and Domino are this drafter
with parts added, see networks.DrafterConfig.
Source: DFlash, arXiv 2602.06036 sections 3-4, and its released model.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax import layers
from dflash_jax.autoregression import draft
from dflash_jax.cache import KVCache, Pages, Rows
from dflash_jax.config import DrafterConfig
from dflash_jax.drafters.backbone import Attention, Network, definition
from dflash_jax.drafters.base import Borrowed, Params
from dflash_jax.drafters.correctors import Correction
from dflash_jax.proposal import (
  Drafting,
  Moment,
  Proposal,
  from_best,
  from_marginals,
)
from dflash_jax.tree import chain
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention.reference import pack_mask
from pallas_kernels.lm_head_verify import RowStats, lm_head_verify


@dataclasses.dataclass(frozen=True)
class DFlash:
  """The DFlash drafter's formulas, bound to one architecture."""

  config: DrafterConfig

  rereads: ClassVar[int] = 0

  @property
  def taps(self) -> tuple[int, ...]:
    """The target layers it reads."""
    return self.config.target_layer_ids

  @property
  def max_drafts(self) -> int:
    """K - 1 where the anchor's slot predicts nothing, or else K."""
    return self.config.num_drafts

  @property
  def reads_drafts(self) -> bool:
    """Whether a draft's law depends on the drafts before it."""
    return self.config.corrects

  def init(
    self, key: jax.Array, dtype: str = "float32", columns: int | None = None
  ) -> Params:
    """Random parameters: N(0, 0.02) matrices and unit norms.

    Args:
      key: of the draw.
      dtype: of all parameters.
      columns: V', of a trimmed head; correctors hold a row for each.
    """
    network = Network(
      self.config,
      self.config.vocab_size if columns is None else columns,
      rngs=nnx.Rngs(params=key),
    )
    params = nnx.to_pure_dict(nnx.state(network))
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

  def reopen(self, state: KVCache, length: jax.Array) -> KVCache:
    """Rows that hold length i32[B] tokens."""
    return state.reopen(length)

  def cut(
    self, state: KVCache, row: jax.Array, start: jax.Array, shape: Pages
  ) -> Rows:
    """Keys and values of a row's context features, in pages."""
    return state.cut(row, start, shape)

  def paste(
    self, state: KVCache, row: jax.Array, start: jax.Array, pages: Rows
  ) -> KVCache:
    """Writes them into a row."""
    return state.paste(row, start, pages)

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
    """Drafts from the slots of one pass, corrected if the drafter does."""
    network = self._network(params)
    hidden = self.draft(
      params, state, anchor, borrowed.embedding, remaining + 1
    )
    depths = self.max_drafts if drafting.is_tree else drafting.num_nodes
    slots = self.predictions(hidden)[:, :depths]
    if drafting.takes_best and not self.reads_drafts:
      stats = self.read_head(slots, borrowed.head)
      proposal = from_best(stats, borrowed.head_ids)
    else:
      proposal = self._pick(network, slots, anchor, borrowed, drafting, moment)
    return _state_confidence(network, proposal, anchor, slots)

  def _pick(
    self,
    network: Network,
    slots: jax.Array,
    anchor: jax.Array,
    borrowed: Borrowed,
    drafting: Drafting,
    moment: Moment,
  ) -> Proposal:
    """Drafts by the logits of slots f32[B, D, width]."""
    logits = self.logits(slots, borrowed.head)
    asked = (borrowed.head_ids, drafting, moment, self.config.vocab_size)
    corrector = network.corrector
    if corrector is None:
      return from_marginals(logits, *asked)
    scale = self.config.input_embedding_scale
    step = Correction(corrector, borrowed.embedding, scale, logits, slots)
    memory = corrector.start((anchor.shape[0], 1))
    return draft(step, memory, anchor, *asked, max_depth=slots.shape[1])

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
    batch = anchor.shape[0]

    def attend(index, query, key, value, mask):
      # Void slots, whom nobody sees, must still see themselves.
      seen = pack_mask(mask | jnp.eye(K, dtype=bool))
      return block_attention(
        query,
        key.astype(state.dtype),
        value.astype(state.dtype),
        *state.read(index),
        state.length,
        jnp.broadcast_to(seen, (batch, *seen.shape[1:])),
        window=config.layer_windows[index] or None,
      )

    return self.run_block(
      params,
      self.embed(anchor, embedding),
      state.positions(K),
      attend,
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
    attend: Attention,
    exists: jax.Array | None = None,
  ) -> jax.Array:
    """Runs blocks through the draft layers.

    Args:
      params: the drafter's own.
      x: f32[B, K, D], embedded blocks.
      positions: i32[B, K], absolute.
      attend: what a block sees, of its context and of itself.
      exists: bool[B, K], slots others may see; all by default.

    Returns:
      f32[B, K, D] after the final norm.
    """
    network = self._network(params)
    angles = self._angles(positions)
    for index, layer in enumerate(network.layers):
      mask = self._block_mask(index)
      mask = mask if exists is None else mask & exists[:, None]
      x = layer(x, angles, mask, functools.partial(attend, index))
    return network.norm(x)

  def predictions(self, hidden: jax.Array) -> jax.Array:
    """hidden f32[..., K, D] -> the slots that predict, in order of depth."""
    return hidden if self.config.anchor_predicts else hidden[..., 1:, :]

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

  def _network(self, params: Params) -> Network:
    return nnx.merge(definition(self.config), nnx.State(params))


def _state_confidence(
  network: Network, proposal: Proposal, anchor: jax.Array, slots: jax.Array
) -> Proposal:
  """The proposal with the chances that the drafter's own head gives it, if any.

  A node's chance is said from its slot f32[B, D, width] and the token before
  it: drawn drafts after that token have no say in it.
  """
  if network.confidence is None:
    return proposal
  nodes = proposal.tree or chain(*proposal.tokens.shape)
  hidden = jnp.take_along_axis(slots, nodes.depths[..., None] - 1, axis=1)
  seen = None
  if network.confidence.sees_token and network.corrector is not None:
    rows = jnp.concatenate([anchor[:, None], proposal.tokens], axis=1)
    before = jnp.take_along_axis(rows, nodes.parents, axis=1)
    seen = network.corrector.row(before)
  odds = network.confidence(hidden, seen)
  return dataclasses.replace(proposal, confidence=jax.nn.sigmoid(odds))
