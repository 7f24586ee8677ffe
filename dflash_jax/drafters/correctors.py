"""Heads that correct a slot's logits by the tokens drafted before it.

DFlash's slots do not see each other's tokens, so likely drafts may not fit
together. A corrector reads the tokens of the block one by one, which is cheap,
and bends the logits that the one pass over the block has made:

    memory, clue = read(memory, token, its embedding, the next slot's state)
    logits = correct(logits, clue, the next slot's state)

Only `read` need run in order. All arrays may have any leading axes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax import layers
from dflash_jax.likeliest import find_likeliest
from dflash_jax.networks import DrafterConfig, Gru, Markov, Selector

Memory = Any  # a pytree of the corrector's own


class Corrector(nnx.Module):
  """What a head must be.

  Attributes:
    plain_slots: predictions at the start of a block that it leaves alone.
  """

  plain_slots: int = 0

  def start(self, shape: tuple[int, ...]) -> Memory:
    """The memory before the anchor is read, with these leading axes."""
    del shape
    return ()

  def read(
    self,
    memory: Memory,
    tokens: jax.Array,
    embeddings: jax.Array,
    hidden: jax.Array,
  ) -> tuple[Memory, jax.Array]:
    """Takes in a token.

    Args:
      memory: of the tokens before it.
      tokens: i32[...], the anchor at first.
      embeddings: f32[..., D], the target's rows of them.
      hidden: f32[..., D], state of the slot that predicts what comes next.

    Returns:
      The memory after it, and the clue f32[..., X] for `correct`.
    """
    raise NotImplementedError

  def correct(
    self, logits: jax.Array, clue: jax.Array, hidden: jax.Array
  ) -> jax.Array:
    """f32[..., V'] in place of the slot's own logits f32[..., V']."""
    raise NotImplementedError

  def row(self, tokens: jax.Array) -> jax.Array:
    """f32[..., r], what a confidence head may see of tokens i32[...]."""
    raise NotImplementedError


def make_corrector(
  config: DrafterConfig, columns: int, *, rngs: nnx.Rngs
) -> Corrector | None:
  """The corrector that a config asks for, of a head of `columns` columns."""
  V, D = config.vocab_size, config.width
  if config.selector:
    return SelectorHead(config.selector, V, columns, D, rngs=rngs)
  if config.markov:
    return MarkovHead(config.markov, V, columns, D, rngs=rngs)
  if config.gru:
    return GruHead(config.gru, columns, D, rngs=rngs)
  return None


class SelectorHead(Corrector):
  """DFlash 2's path selector: pairs of neighbours among likely tokens.

  S(a, b) = U(b) + <A[a] * (W h), B[b]> for the top_k tokens b of the slot's
  logits U, a the token before; all others are out.
  Source: the DFlash 2 model of package dflash 0.1.0.
  """

  def __init__(
    self,
    config: Selector,
    vocab_size: int,
    columns: int,
    width: int,
    *,
    rngs: nnx.Rngs,
  ):
    self.top_k = config.top_k
    self.predecessors = layers.normal(rngs, (vocab_size, config.rank))
    # Zero, so that an untrained selector changes no choice.
    self.successors = nnx.Param(jnp.zeros((columns, config.rank)))
    self.projection = layers.Linear(width, config.rank, rngs=rngs)

  def read(self, memory, tokens, embeddings, hidden):
    del embeddings, hidden
    return memory, self.predecessors[...][tokens].astype(jnp.float32)

  def correct(self, logits, clue, hidden):
    columns, scores = self.rank(logits, clue, hidden)
    out = jnp.full_like(logits, -jnp.inf)
    return jnp.put_along_axis(out, columns, scores, axis=-1, inplace=False)

  def rank(
    self, logits: jax.Array, clue: jax.Array, hidden: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Columns i32[..., k] of the likeliest tokens, and S f32[..., k] of them.

    Arguments as in `correct`.
    """
    columns = find_likeliest(logits, min(self.top_k, logits.shape[-1]))
    likely = jnp.take_along_axis(logits, columns, axis=-1)
    return columns, likely + self.pair(clue, hidden, columns)

  def pair(
    self, clue: jax.Array, hidden: jax.Array, columns: jax.Array
  ) -> jax.Array:
    """<A[a] * (W h), B[b]> f32[..., k] for columns b i32[..., k]."""
    asked = clue * self.projection(hidden)
    rows = self.successors[...][columns].astype(jnp.float32)
    return jnp.einsum(
      "...r,...kr->...k", asked, rows, precision=jax.lax.Precision.HIGHEST
    )


class MarkovHead(Corrector):
  """DSpark's Markov head: a bias of low rank by the token before.

  With e = W1[x]: vanilla, W2 e; gated, W2 (sigmoid(G [h; e] + b) * e); rnn,
  with [g; c; o] = J [s; e; h] + b, W2 tanh(o), and s' = sigmoid(g) s + (1 -
  sigmoid(g)) tanh(c), from s = 0.
  Source: DSpark, arXiv 2607.05147, and the heads of package speculators 0.9.0.
  """

  def __init__(
    self,
    config: Markov,
    vocab_size: int,
    columns: int,
    width: int,
    *,
    rngs: nnx.Rngs,
  ):
    rank = config.rank
    self.rank = rank
    self.before = layers.normal(rngs, (vocab_size, rank))
    self.after = layers.Linear(rank, columns, rngs=rngs)

    def linear(width_in: int, width_out: int) -> layers.Linear:
      return layers.Linear(width_in, width_out, rngs=rngs, bias=True)

    is_gated, is_rnn = config.kind == "gated", config.kind == "rnn"
    self.gate = linear(width + rank, rank) if is_gated else None
    self.joint = linear(2 * rank + width, 3 * rank) if is_rnn else None

  def start(self, shape):
    return jnp.zeros((*shape, self.rank)) if self.joint else ()

  def row(self, tokens):
    return self.before[...][tokens].astype(jnp.float32)

  def read(self, memory, tokens, embeddings, hidden):
    del embeddings
    row = self.row(tokens)
    if self.gate:
      gate = self.gate(jnp.concatenate([hidden, row], axis=-1))
      return memory, jax.nn.sigmoid(gate) * row
    if self.joint:
      joint = self.joint(jnp.concatenate([memory, row, hidden], axis=-1))
      gate, new, out = jnp.split(joint, 3, axis=-1)
      gate = jax.nn.sigmoid(gate)
      return gate * memory + (1 - gate) * jnp.tanh(new), jnp.tanh(out)
    return memory, row

  def correct(self, logits, clue, hidden):
    del hidden
    return logits + self.after(clue)


class GruHead(Corrector):
  """Domino's correction head: a GRU over the block's tokens.

  logits + W2 silu(W1 [h; s]), s the GRU's state after the anchor and all
  tokens up to the one before.
  Source: Domino, arXiv 2605.29707, and the model of package specforge 0.2.0.
  """

  def __init__(self, config: Gru, columns: int, width: int, *, rngs: nnx.Rngs):
    self.plain_slots = config.plain_slots
    self.state_width = config.state_width
    limit = config.state_width**-0.5

    def uniform(rows: int) -> nnx.Param:
      shape = (rows, 3 * config.state_width)
      return nnx.Param(
        jax.random.uniform(rngs.params(), shape, minval=-limit, maxval=limit)
      )

    self.input_kernel = uniform(width)
    self.state_kernel = uniform(config.state_width)
    self.narrow = layers.Linear(
      width + config.state_width, config.width, rngs=rngs
    )
    self.widen = layers.Linear(config.width, columns, rngs=rngs)

  def start(self, shape):
    return jnp.zeros((*shape, self.state_width))

  def read(self, memory, tokens, embeddings, hidden):
    del tokens, hidden
    given = layers.matmul(embeddings, self.input_kernel[...])
    kept = layers.matmul(memory, self.state_kernel[...])
    reset_in, update_in, new_in = jnp.split(given, 3, axis=-1)
    reset_own, update_own, new_own = jnp.split(kept, 3, axis=-1)
    reset = jax.nn.sigmoid(reset_in + reset_own)
    update = jax.nn.sigmoid(update_in + update_own)
    new = jnp.tanh(new_in + reset * new_own)
    memory = (1 - update) * new + update * memory
    return memory, memory

  def correct(self, logits, clue, hidden):
    narrow = self.narrow(jnp.concatenate([hidden, clue], axis=-1))
    return logits + self.widen(jax.nn.silu(narrow))


@dataclasses.dataclass(frozen=True)
class Correction:
  """The step of `draft_chain` and `draft_tree`: one slot, corrected.

  Attributes:
    corrector: whose memory is the carry.
    embedding: f[V, D], the target's. scale: of its rows.
    logits: f32[B, D, V'], of all depths. slots: f32[B, D, width].
  """

  corrector: Corrector
  embedding: jax.Array
  scale: float
  logits: jax.Array
  slots: jax.Array

  def __call__(
    self, memory: Memory, tokens: jax.Array, parents: jax.Array, depth: int
  ) -> tuple[Memory, jax.Array]:
    """See autoregression.Step."""

    def of_parent(rows: jax.Array) -> jax.Array:
      index = parents.reshape(*parents.shape, *[1] * (rows.ndim - 2))
      return jnp.take_along_axis(rows, index, axis=1)

    def of_slot(rows: jax.Array) -> jax.Array:
      shape = (*tokens.shape, rows.shape[-1])
      return jnp.broadcast_to(rows[:, depth, None], shape)

    hidden, logits = of_slot(self.slots), of_slot(self.logits)
    memory, clue = self.corrector.read(
      jax.tree.map(of_parent, memory),
      tokens,
      self.embedding[tokens].astype(jnp.float32) * self.scale,
      hidden,
    )
    if depth < self.corrector.plain_slots:
      return memory, logits
    return memory, self.corrector.correct(logits, clue, hidden)


def make_confidence(
  config: DrafterConfig, *, rngs: nnx.Rngs
) -> "ConfidenceHead | None":
  """The confidence head that a config asks for."""
  if config.confidence is None:
    return None
  rank = 0
  if config.confidence.sees_token and config.markov:
    rank = config.markov.rank
  return ConfidenceHead(config.width, rank, rngs=rngs)


class ConfidenceHead(nnx.Module):
  """DSpark's estimate of the chance that a draft is accepted.

  sigmoid(w [h; W1[x]] + b), trained towards 1 - |p - q| / 2 summed over
  tokens, which is that chance. Source: as MarkovHead.
  """

  def __init__(self, width: int, rank: int, *, rngs: nnx.Rngs):
    """`rank` is that of the Markov rows it reads, 0 for none."""
    self.sees_token = rank > 0
    self.projection = layers.Linear(width + rank, 1, rngs=rngs, bias=True)

  def __call__(self, hidden: jax.Array, row: jax.Array | None) -> jax.Array:
    """Log-odds f32[...] of hidden f32[..., D]; row f32[..., r] is Markov's."""
    if row is not None:
      hidden = jnp.concatenate([hidden, row], axis=-1)
    return self.projection(hidden)[..., 0]
