"""EAGLE-3: one layer that feeds its own output back, a token at a time.

The layer reads pairs of a token and a hidden state of the position *before* it.
For committed tokens that state is made of three of the target's layers; while
drafting it is the layer's own output, which is why training unrolls the layer
("training-time test", see `Eagle3.begin_chains`). Embedding, hidden state and
output are of one width D; the head may keep a part of the vocabulary.
Source: EAGLE-3, arXiv 2503.01840, section 3, and its released model.
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
from dflash_jax.drafters.base import Borrowed, Params
from dflash_jax.drafters.eagle3_network import Network, definition
from dflash_jax.drafters.nodes import Attention, Nodes, attend_chains, gather
from dflash_jax.networks import ConfigError, Eagle3Config, TargetConfig
from dflash_jax.proposal import Drafting, Moment, Proposal

# Parameters that are no part of the network: tables that are looked up.
_TABLES = ("embedding", "head_ids")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eagle3State:
  """The pairs of committed tokens.

  The state of the newest token waits for the token after it, so there is one
  pair fewer than there are tokens, and pair i stands at position i.

  Attributes:
    cache: the layer's keys and values of all pairs.
    waiting: f32[B, D], the fused taps of the newest token.
    begun: bool[B], whether there is one.
  """

  cache: KVCache
  waiting: jax.Array
  begun: jax.Array


@dataclasses.dataclass(frozen=True)
class Eagle3:
  """The EAGLE-3 drafter's formulas, bound to one architecture.

  Attributes:
    config: of the network.
    max_drafts: steps a proposal may take, one per depth.
  """

  config: Eagle3Config
  max_drafts: int

  reads_drafts: ClassVar[bool] = True
  rereads: ClassVar[int] = 1

  @property
  def taps(self) -> tuple[int, ...]:
    """The target layers it reads."""
    return self.config.target_layer_ids

  def check_target(self, target: TargetConfig) -> None:
    """Raises ConfigError, naming both numbers, if `target` does not fit."""
    self.config.check_target(target)

  def init(
    self, key: jax.Array, dtype: str = "float32", columns: int | None = None
  ) -> Params:
    """Random parameters: N(0, 0.02) matrices and unit norms.

    Args:
      key: of the draw.
      dtype: of all parameters.
      columns: V', for a caller who keeps the ids of a reduced head, as training
        does, and whom `bind` asks for them. None puts the first ids there.

    Raises:
      ConfigError: if the head has not that many columns.
    """
    V, size = self.config.vocab_size, self.config.draft_vocab_size
    if columns not in (None, size):
      raise ConfigError(
        f"draft_vocab_size={size} does not fit {columns} columns; make them "
        "equal"
      )
    network_key, table_key = jax.random.split(key)
    network = Network(self.config, rngs=nnx.Rngs(params=network_key))
    params = nnx.to_pure_dict(nnx.state(network))
    if self.config.own_embedding:
      shape = (self.config.vocab_size, self.config.width)
      rngs = nnx.Rngs(params=table_key)
      params["embedding"] = layers.normal(rngs, shape)[...]
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    if size < V and columns is None:
      params["head_ids"] = jnp.arange(size, dtype=jnp.int32)
    return params

  def count_parameters(self) -> int:
    """Trained numbers of a checkpoint, counted without allocating any."""
    columns = self.config.draft_vocab_size
    init = functools.partial(self.init, columns=columns)
    tree = jax.eval_shape(init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  def bind(self, params: Params, borrowed: Borrowed) -> Params:
    """All that drafting reads: its parameters, and the tables they lack.

    Args:
      params: as `init` or weights.load_eagle3 gives them.
      borrowed: the target's tables; head_ids are those of a reduced head that
        brings none of its own.
    """
    missing: Params = {}
    if not self.config.own_embedding:
      missing["embedding"] = borrowed.embedding
    if borrowed.head_ids is not None:
      missing["head_ids"] = borrowed.head_ids
    return {**missing, **params}

  # --- Decoding ---------------------------------------------------------------

  def init_state(self, batch: int, capacity: int, dtype: str) -> Eagle3State:
    """No pairs yet."""
    cache = KVCache.create(
      num_layers=1,
      batch=batch,
      num_kv_heads=self.config.num_kv_heads,
      capacity=capacity,
      head_width=self.config.head_width,
      dtype=jnp.dtype(dtype),
    )
    waiting = jnp.zeros((batch, self.config.width), jnp.float32)
    return Eagle3State(cache, waiting, jnp.zeros((batch,), bool))

  def absorb(
    self,
    params: Params,
    state: Eagle3State,
    taps: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
  ) -> Eagle3State:
    """Pairs each token with the state before it, which may have waited.

    A row's very first token has none: its pairs begin with the next.
    """
    fused = self.fuse(params, taps)
    _, T = tokens.shape
    skipped = 1 - state.begun.astype(jnp.int32)
    places = skipped[:, None] + jnp.arange(T, dtype=jnp.int32)
    states = jnp.concatenate([state.waiting[:, None], fused], axis=1)
    followers = jnp.pad(tokens, ((0, 0), (0, 1)))
    key, value = self.keys_values(
      params,
      gather(followers, places),
      gather(states, places),
      state.cache.positions(T),
    )
    rows = Rows((key,), (value,))
    return Eagle3State(
      cache=state.cache.extend(rows, jnp.maximum(count - skipped, 0)),
      waiting=gather(states, count[:, None])[:, 0],
      begun=state.begun | (count > 0),
    )

  def reopen(self, state: Eagle3State, length: jax.Array) -> Eagle3State:
    """Rows that hold length i32[B] tokens and the pair after them.

    No state waits, as if the next token were a row's first: the pair that it
    would make is the one that is there.
    """
    begun = jnp.zeros_like(state.begun)
    return Eagle3State(state.cache.reopen(length), state.waiting, begun)

  def cut(
    self, state: Eagle3State, row: jax.Array, start: jax.Array, shape: Pages
  ) -> Rows:
    """The pairs that end in a row's tokens, in pages.

    Token i ends pair i - 1; the row's first token ends none.
    """
    rows = state.cache.cut(row, jnp.maximum(start - 1, 0), shape)
    return rows.roll(jnp.where(start == 0, 1, 0))

  def paste(
    self, state: Eagle3State, row: jax.Array, start: jax.Array, pages: Rows
  ) -> Eagle3State:
    """Writes them into a row; behind the first pages, one void pair more."""
    rows = pages.roll(jnp.where(start == 0, -1, 0))
    cache = state.cache.paste(row, jnp.maximum(start - 1, 0), rows)
    return dataclasses.replace(state, cache=cache)

  def propose(
    self,
    params: Params,
    state: Eagle3State,
    anchor: jax.Array,
    borrowed: Borrowed,
    drafting: Drafting,
    moment: Moment,
    remaining: jax.Array,
  ) -> Proposal:
    """Drafts depth by depth: the anchor with the waiting state, then on."""
    del borrowed, remaining
    return draft(
      functools.partial(self._step, params, state.cache),
      (Nodes.before(state.cache), state.waiting[:, None]),
      anchor,
      params.get("head_ids"),
      drafting,
      moment,
      self.config.vocab_size,
      self.max_drafts,
    )

  def _step(
    self,
    params: Params,
    cache: KVCache,
    above: tuple[Nodes, jax.Array],
    tokens: jax.Array,
    parents: jax.Array,
    depth: int,
  ) -> tuple[tuple[Nodes, jax.Array], jax.Array]:
    """The logits after each of tokens i32[B, W], all at one depth.

    `above` has the nodes drafted before, and the newest ones' outputs.
    """
    nodes, outputs = above
    seen = nodes.below(parents)
    hidden, rows = self.forward(
      params,
      tokens,
      gather(outputs, parents),
      cache.length[:, None] + jnp.full_like(tokens, depth),
      functools.partial(nodes.attend, cache, seen),
      cache.dtype,
    )
    return (nodes.add(rows, seen), hidden), self.logits(params, hidden)

  # --- Formulas that decoding and training share ------------------------------

  def fuse(self, params: Params, taps: jax.Array) -> jax.Array:
    """taps f32[..., taps * D_target] -> f32[..., D], the target's view."""
    return self._network(params).context_projection(taps)

  def keys_values(
    self,
    params: Params,
    tokens: jax.Array,
    hidden: jax.Array,
    positions: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """Of pairs, rotated keys and plain values, f32[B, G, T, H] each."""
    network = self._network(params)
    pair = network.pair(self._embed(params, tokens), hidden)
    key, value = network.attention.keys_values(pair, self._angles(positions))
    return key.swapaxes(1, 2), value.swapaxes(1, 2)

  def forward(
    self,
    params: Params,
    tokens: jax.Array,
    hidden: jax.Array,
    positions: jax.Array,
    attend: Attention,
    dtype: jnp.dtype,
  ) -> tuple[jax.Array, Rows]:
    """The layer on pairs.

    Args:
      params: of `bind`.
      tokens: i32[B, T].
      hidden: f32[B, T, D], of the position before each: fused taps, or the
        layer's output there.
      positions: i32[B, T], of those states, one less than the tokens' own.
      attend: what each pair sees, itself included.
      dtype: of keys and values.

    Returns:
      f32[B, T, D], which `logits` reads and the next step takes as `hidden`;
      and the pairs' keys and values.
    """
    network = self._network(params)
    angles = self._angles(positions)
    pair = network.pair(self._embed(params, tokens), hidden)
    query = network.attention.queries(pair, angles)
    key, value = (
      rows.swapaxes(1, 2).astype(dtype)
      for rows in network.attention.keys_values(pair, angles)
    )
    if self.config.norm_before_residual:
      hidden = network.hidden_norm(hidden)
    x = hidden + network.attention.merge(attend(0, query, key, value))
    x = x + network.mlp(network.mlp_norm(x))
    return x, Rows((key,), (value,))

  def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
    """f32[..., D] of `forward` -> f32[..., V'] of the draft vocabulary."""
    network = self._network(params)
    return network.head(network.norm(hidden))

  def begin_chains(
    self,
    params: Params,
    tokens: jax.Array,
    taps: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
  ) -> tuple[jax.Array, Rows]:
    """Reads a text, from every row of which chains may go on: their step 0.

    Step s of the chain that leaves the text at row t pairs token t + 1 + s with
    the output of step s - 1, and sees step 0 up to t and its own steps since.
    Its output predicts token t + 2 + s. With the true tokens, these are the
    steps of drafting, up to the first draft that is wrong.
    Source: EAGLE-3, arXiv 2503.01840, section 3.2 (training-time test).

    Args:
      params: of `bind`.
      tokens: i32[B, T].
      taps: f32[B, T, taps * D_target], the target's states at `tokens`.
      positions: i32[B, T], of `tokens`.
      mask: bool[B, T, T], which rows a row sees: itself and those before it, in
        its own document.

    Returns:
      f32[B, T, D], for `logits` and the chains; and the keys and values. The
      last row, which no token follows, is void.
    """
    return self.forward(
      params,
      jnp.roll(tokens, -1, axis=1),
      self.fuse(params, taps),
      positions,
      functools.partial(attend_chains, [], mask),
      params["head"]["kernel"].dtype,
    )

  def continue_chains(
    self,
    params: Params,
    text: tuple[jax.Array, Rows],
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
  ) -> list[jax.Array]:
    """All steps of the chains that leave a text at C of its rows.

    Args:
      params: of `bind`.
      text: f32[B, C, D] of `begin_chains` at these rows; all its keys and
        values.
      tokens: i32[B, C, steps], what each step pairs.
      positions: i32[B, C], of these rows.
      mask: bool[B, C, T], what they see of the text.

    Returns:
      f32[B, C, D] per step, for `logits`.
    """
    hidden, rows = text
    outputs, chains = [hidden], [rows]
    for step in range(1, tokens.shape[-1]):
      hidden, rows = self.forward(
        params,
        tokens[..., step],
        hidden,
        positions + step,
        functools.partial(attend_chains, chains, mask),
        params["head"]["kernel"].dtype,
      )
      chains.append(rows)
      outputs.append(hidden)
    return outputs

  def _embed(self, params: Params, tokens: jax.Array) -> jax.Array:
    return params["embedding"][tokens].astype(jnp.float32)

  def _angles(self, positions: jax.Array) -> jax.Array:
    return layers.rotary_angles(
      positions,
      self.config.head_width,
      self.config.rotary_base,
      self.config.rotary_scaling,
    )

  def _network(self, params: Params) -> Network:
    own = {name: x for name, x in params.items() if name not in _TABLES}
    return nnx.merge(definition(self.config), nnx.State(own))
