"""What a drafter says in training blocks, given the answer's own tokens.

Decoding reads the context from a cache and corrects one slot after another by
what it drafted; training has many blocks of a row at once and corrects every
slot by the token that the answer has before it (teacher forcing). Up to its
first mistake a greedy draft reads the same, so that the leading runs counted
here are those of decoding.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax import layers
from dflash_jax.drafters import Borrowed, DFlash
from dflash_jax.drafters.backbone import definition
from dflash_jax.drafters.correctors import Corrector, SelectorHead
from dflash_jax.target import Params
from train.anchors import Blocks, document_starts
from train.fused_attention import attend_fused
from train.losses import is_best, overlap, take

# Of a batch's rows, per draft layer: keys and values, each f[B, G, S, H].
Context = list[tuple[jax.Array, jax.Array]]


def read_context(
  drafter: DFlash,
  params: Params,
  taps: jax.Array,
  documents: jax.Array,
  dtype: str,
) -> Context:
  """The context of all blocks of a batch, computed once.

  Args:
    drafter: the formulas.
    params: the drafter's own, in the compute dtype.
    taps: f[B, S, taps * D].
    documents: i32[B, S]; positions are counted in each.
    dtype: of the keys and values.
  """
  B, S, _ = taps.shape
  positions = jnp.broadcast_to(jnp.arange(S), (B, S))
  positions = positions - document_starts(documents)
  rows = drafter.context_keys_values(params, taps, positions)
  return jax.tree.map(lambda x: x.swapaxes(1, 2).astype(dtype), rows)


def run_blocks(
  drafter: DFlash,
  params: Params,
  embedding: jax.Array,
  context: Context,
  blocks: Blocks,
  fuses: bool = False,
) -> jax.Array:
  """f32[B, A, K', D]: the slots of every block that predict.

  The exact rule of a block's attention: the anchor's document strictly before
  the anchor, plus the block itself. Each part is its own attention, merged by
  log-sum-exp, so no mask over [A K, S + A K] exists; or both are one, by cuDNN,
  where `fuses` (train/fused_attention.py).
  """
  B, A = blocks.anchors.shape
  K = drafter.config.block_size
  S = context[0][0].shape[2]
  places = blocks.anchors[..., None] + jnp.arange(K)  # [B, A, K]
  slots = jnp.arange(S)
  before = slots < blocks.anchors[..., None, None]  # [B, A, 1, S]
  before &= slots >= blocks.starts[..., None, None]
  age = places[..., None] - slots

  def attend(index, query, key, value, mask):
    window = drafter.config.layer_windows[index]
    visible = before & (age < window) if window else before
    visible = jnp.broadcast_to(visible, age.shape).reshape(B, A * K, S)
    if fuses:
      own = key, value
      return attend_fused(query, own, context[index], visible, mask)
    block = layers.attend_with_lse(query, key, value, mask)
    rows = query.reshape(B, A * K, *query.shape[2:])
    keys, values = context[index]
    out, lse = layers.attend_with_lse(rows, keys, values, visible)
    seen = out.reshape(query.shape), lse.reshape(query.shape[:-1])
    return layers.merge_attention(seen, block)

  positions = places - blocks.starts[..., None]
  x = drafter.embed(blocks.tokens[..., 0].reshape(-1), embedding)
  hidden = drafter.run_block(params, x, positions.reshape(-1, K), attend)
  return drafter.predictions(hidden).reshape(B, A, drafter.max_drafts, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
  """A selector's candidates of each slot, best first.

  Attributes:
    columns: i32[X, K', k]. scores: f32[X, K', k].
    label_score: f32[X, K'], what the label scores, candidate or not.
  """

  columns: jax.Array
  scores: jax.Array
  label_score: jax.Array

  def is_label(self, columns: jax.Array) -> jax.Array:
    """bool[X, K', k]: which candidate, if any, is label i32[X, K']."""
    return self.columns == columns[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafts:
  """What the drafter says of X blocks.

  Attributes:
    plain: f32[X, K', V'], the slots' own logits.
    corrected: the same after a correction head, or None.
    choice: of a selector, or None.
    odds: f32[X, K'], log-odds that a draft is accepted, or None.
  """

  plain: jax.Array
  corrected: jax.Array | None
  choice: Choice | None
  odds: jax.Array | None

  @property
  def law(self) -> jax.Array:
    """f32[X, K', V']: the logits that losses over the vocabulary train.

    A selector leaves these alone: it orders the likeliest of them.
    """
    return self.plain if self.corrected is None else self.corrected

  def is_right(self, columns: jax.Array) -> jax.Array:
    """bool[X, K']: whether greedy drafting says labels i32[X, K']."""
    if self.choice is None:
      return is_best(self.law, columns)
    best = self.choice.scores >= self.choice.scores.max(-1, keepdims=True)
    return (self.choice.is_label(columns) & best).any(axis=-1)

  def chance(self, teacher: jax.Array) -> jax.Array:
    """f32[X, K']: of acceptance at temperature 1, given the target's log p."""
    if self.choice is None:
      return overlap(self.law, teacher)
    known = jnp.take_along_axis(teacher, self.choice.columns, axis=-1)
    return overlap(self.choice.scores, known)


def read_drafts(
  drafter: DFlash,
  params: Params,
  embedding: jax.Array,
  head: jax.Array,
  hidden: jax.Array,
  previous: jax.Array,
  columns: jax.Array,
) -> Drafts:
  """Reads the head, and the drafter's own heads, of X blocks.

  Args:
    drafter: the formulas.
    params: the drafter's own, in the compute dtype.
    embedding: f[V, D]. head: f[D, V'], the target's.
    hidden: f32[X, K', D], from `run_blocks`.
    previous: i32[X, K'], the token before each label.
    columns: i32[X, K'], of the labels; -1 for one that the head lacks.
  """
  network = nnx.merge(definition(drafter.config), nnx.State(params))
  plain = drafter.logits(hidden, head)
  corrected = choice = odds = None
  if (corrector := network.corrector) is not None:
    rows = embedding[previous].astype(jnp.float32)
    rows = rows * drafter.config.input_embedding_scale
    clues = _read(corrector, previous, rows, hidden)
    if isinstance(corrector, SelectorHead):
      pair = corrector.pair(clues, hidden, jnp.maximum(columns, 0)[..., None])
      choice = Choice(
        *corrector.rank(plain, clues, hidden),
        label_score=take(plain, columns) + pair[..., 0],
      )
    else:
      stays = jnp.arange(previous.shape[1]) < corrector.plain_slots
      corrected = corrector.correct(plain, clues, hidden)
      corrected = jnp.where(stays[:, None], plain, corrected)
  if network.confidence is not None:
    seen = None
    if network.confidence.sees_token:
      seen = network.corrector.row(previous)
    odds = network.confidence(hidden, seen)
  return Drafts(plain, corrected, choice, odds)


def _read(
  corrector: Corrector, tokens: jax.Array, rows: jax.Array, hidden: jax.Array
) -> jax.Array:
  """The clue f32[X, K', ...] that each slot has of the tokens before it."""
  memory = corrector.start(tokens.shape[:1])
  if not jax.tree.leaves(memory):  # all slots at once
    return corrector.read(memory, tokens, rows, hidden)[1]

  def step(memory, slot):
    return corrector.read(memory, *slot)

  slots = jax.tree.map(lambda x: x.swapaxes(0, 1), (tokens, rows, hidden))
  return jax.lax.scan(step, memory, slots)[1].swapaxes(0, 1)


def find_columns(labels: jax.Array, borrowed: Borrowed) -> jax.Array:
  """Columns of labels i32[...] in the draft head; -1 where it lacks them."""
  ids = borrowed.head_ids
  if ids is None:
    return labels
  column = jnp.minimum(jnp.searchsorted(ids, labels), len(ids) - 1)
  return jnp.where(ids[column] == labels, column, -1)
