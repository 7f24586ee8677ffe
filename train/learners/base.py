"""How a drafter learns from a batch: one road for all, with gaps to fill in.

The target's states are read once, anchors are drawn, blocks are cut from the
rows, the drafter says something at every slot, and the objective judges it. A
family says what is its own in three methods: `read`, `run` and `say`. All sums
are of rows that know nothing of each other, so that a batch may be cut, by
rows, into pieces or among devices.
"""

import abc
import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from dflash_jax import layers
from dflash_jax.config import TrainConfig
from dflash_jax.drafters import Borrowed
from dflash_jax.target import Params, Target
from train import anchors as anchors_lib
from train.anchors import Blocks, document_starts
from train.drafts import Drafts, find_columns
from train.objective import Objective, slot_sums
from train.packing import read_packed
from train.pieces import map_pieces
from train.state import Batch
from train.sums import SlotSums

Context = Any  # what a family knows of whole rows, each leaf [B, ...]


@dataclasses.dataclass(frozen=True)
class Learner(abc.ABC):
  """A drafter, its target and the settings: hashable, so jit can close over it.

  Attributes:
    target, drafter: the formulas.
    settings: the frozen items of a TrainConfig.
  """

  target: Target
  drafter: Any
  settings: tuple[tuple[str, Any], ...]

  @classmethod
  def create(cls, target: Target, drafter: Any, config: TrainConfig) -> Self:
    """Binds the formulas to a config.

    Raises:
      ConfigError: for a loss that is none, or does not fit the drafter.
    """
    settings = tuple(sorted(dataclasses.asdict(config).items()))
    learner = cls(target, drafter, settings)
    learner.check()
    return learner

  def check(self) -> None:
    """Raises ConfigError unless the objective fits the drafter."""
    self.objective.check_drafter(self.drafter.config)

  @property
  def config(self) -> TrainConfig:
    """The settings as the dataclass they came from."""
    return TrainConfig(**dict(self.settings))

  @property
  def objective(self) -> Objective:
    """What the settings minimise."""
    return Objective.of(self.config)

  @property
  def layers_read(self) -> tuple[int, ...]:
    """The drafter's taps, then the last layer if it teaches."""
    last = (self.target.config.num_layers - 1,)
    return self.drafter.taps + (last if self.objective.needs_teacher else ())

  @property
  def tap_width(self) -> int:
    """Channels of the drafter's taps."""
    return len(self.drafter.taps) * self.target.config.width

  @property
  def slots(self) -> int:
    """K', drafts of a training block."""
    return self.drafter.max_drafts

  def init(self, key: jax.Array, columns: int | None = None) -> Params:
    """Fresh float32 parameters; `columns` is V' of a trimmed head."""
    return self.drafter.init(key, columns=columns)

  def bind(self, params: Params, borrowed: Borrowed) -> Params:
    """What decoding reads: the drafter's own, and tables kept beside them."""
    del borrowed
    return params

  # --- What is a family's own -------------------------------------------------

  @abc.abstractmethod
  def read(
    self, params: Params, borrowed: Borrowed, taps: jax.Array, batch: Batch
  ) -> Context:
    """What all blocks of a row share, computed once.

    Args:
      params: the drafter's own, folded, in the compute dtype.
      borrowed: the target's tables.
      taps: f[B, S, taps * D].
      batch: the rows; their labels are not for reading.
    """

  @abc.abstractmethod
  def run(
    self, params: Params, borrowed: Borrowed, context: Context, blocks: Blocks
  ) -> jax.Array:
    """f32[B, A, K', D]: the states that predict the labels of blocks."""

  @abc.abstractmethod
  def say(
    self,
    params: Params,
    borrowed: Borrowed,
    hidden: jax.Array,
    previous: jax.Array,
    columns: jax.Array,
  ) -> Drafts:
    """What X blocks draft.

    Args:
      params, borrowed: as `read` takes them, the head in the compute dtype.
      hidden: f32[X, K', D], of `run`.
      previous: i32[X, K'], the token before each label.
      columns: i32[X, K'], of the labels; -1 for one that the head lacks.
    """

  # --- A batch ----------------------------------------------------------------

  def draw(self, keys: jax.Array, batch: Batch) -> Blocks:
    """The blocks of one step: all that is random in it, by key[B] of rows."""
    anchors, valid = anchors_lib.draw_anchors(
      keys,
      batch.loss_mask,
      self.config.num_anchors,
      batch.documents,
      max(self.config.packing, 1),
    )
    return self.cut(batch, anchors, valid, self.slots)

  def sums(
    self,
    params: Params,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
    blocks: Blocks,
    plain_share: jax.Array | float = 0.0,
  ) -> SlotSums:
    """Sums over all blocks of a batch.

    Args:
      params: the drafter's own, folded.
      target_params, borrowed: of the target.
      batch, blocks: rows, and what `draw` cut from them.
      plain_share: from Objective.plain_share.
    """
    size = self.config.anchor_chunk or blocks.anchors.shape[1]
    _, sums = self._sum_anchors(
      params, target_params, borrowed, batch, blocks, size, plain_share
    )
    return sums

  def matches(
    self,
    params: Params,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
    devices: int = 1,
  ) -> tuple[jax.Array, SlotSums]:
    """Which drafts would be right at every anchor of the answers.

    A draft that depends on the drafts before it reads the answer's tokens
    instead: up to its first mistake these are the same, and nobody asks beyond.

    Args:
      params, target_params, borrowed: as in `sums`.
      batch: any rows.
      devices: that share a batch in training.

    Returns:
      bool[B, S, K'], and the sums over all valid anchors.
    """
    anchors, valid = anchors_lib.every_anchor(batch.loss_mask, batch.documents)
    blocks = self.cut(batch, anchors, valid, self.drafter.max_drafts)
    # About as many at a time as in training, which fit.
    config = self.config
    pieces = config.accumulate * devices
    rows = config.batch_size * max(config.packing, 1) // pieces
    size = max(rows * config.num_anchors // len(anchors), 1)
    size = min(config.anchor_chunk or size, anchors.shape[1])
    return self._sum_anchors(
      params, target_params, borrowed, batch, blocks, size
    )

  def taps(self, target_params: Params, batch: Batch) -> jax.Array:
    """f[B, S, layers * D]: the target's states, cached or computed here."""
    if not self.layers_read:
      return jnp.zeros((*batch.tokens.shape, 0))
    if batch.taps is not None:
      return batch.taps
    if self.config.packing:
      starts = document_starts(batch.documents)
      taps = read_packed(
        self.target, target_params, batch.tokens, starts, self.layers_read
      )
    else:
      dtype = target_params["embedding"].dtype
      cache = self.target.init_cache(batch.tokens.shape[0], 0, dtype)
      _, taps, _ = self.target.forward(
        target_params, batch.tokens, cache, self.layers_read
      )
    return jax.lax.stop_gradient(taps)

  # --- Parts ------------------------------------------------------------------

  def split(
    self, target_params: Params, batch: Batch
  ) -> tuple[jax.Array, jax.Array | None]:
    """The drafter's taps, and the last layer's output if it teaches."""
    states = self.taps(target_params, batch)
    taps, last = jnp.split(states, [self.tap_width], axis=-1)
    return taps, last if self.objective.needs_teacher else None

  def teach(
    self, target_params: Params, last: jax.Array | None, blocks: Blocks
  ) -> jax.Array | None:
    """f32[B, A, K', D]: the target's hidden state before each label.

    A label at position t is what the target said after reading t - 1; its own
    final norm stands between the last layer and the head.
    """
    if last is None:
      return None
    B, A, slots = blocks.labels.shape
    rows = blocks.anchors[..., None] + jnp.arange(slots)
    rows = jnp.minimum(rows, last.shape[1] - 1)
    output = jnp.take_along_axis(last, rows.reshape(B, -1, 1), axis=1)
    hidden = self.target.normalize(target_params, output)
    return hidden.reshape(B, A, slots, -1)

  def cut(
    self, batch: Batch, anchors: jax.Array, valid: jax.Array, slots: int
  ) -> Blocks:
    """Blocks of K' `slots` at anchors i32[B, A], those that are valid."""
    return anchors_lib.cut_blocks(
      batch.tokens, batch.loss_mask, anchors, valid, slots, batch.documents
    )

  def _sum_anchors(
    self,
    params: Params,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
    blocks: Blocks,
    size: int,
    plain_share: jax.Array | float = 0.0,
  ) -> tuple[jax.Array, SlotSums]:
    """Right drafts bool[B, A, K'] and sums, `size` anchors of a row at a time.

    The context is read once for all of them.
    """
    params = jax.tree.map(self._cast, params)
    taps, last = self.split(target_params, batch)
    context = self.read(params, borrowed, taps, batch)

    def chunk(blocks: Blocks) -> tuple[jax.Array, SlotSums]:
      taught = self.teach(target_params, last, blocks)
      hidden = self.run(params, borrowed, context, blocks)
      return self._sum(params, borrowed, hidden, blocks, taught, plain_share)

    return map_pieces(chunk, blocks, size, axis=1)

  def _sum(
    self,
    params: Params,
    borrowed: Borrowed,
    hidden: jax.Array,
    blocks: Blocks,
    taught: jax.Array | None,
    plain_share: jax.Array | float,
  ) -> tuple[jax.Array, SlotSums]:
    """Right drafts bool[B, A, K'] and sums, a few blocks' logits at a time."""
    head = self._cast(borrowed.head)
    tables = dataclasses.replace(borrowed, head=head)

    def chunk(piece):
      hidden, previous, columns, mask, taught = piece
      drafts = self.say(params, tables, hidden, previous, columns)
      teacher = None if taught is None else layers.matmul(taught, head)
      sums = slot_sums(
        self.objective, drafts, columns, mask, teacher, plain_share
      )
      return mask & drafts.is_right(columns), sums

    B, A = blocks.anchors.shape
    columns = find_columns(blocks.labels, borrowed)
    pieces = (hidden, blocks.previous, columns, blocks.mask, taught)
    flat = jax.tree.map(lambda x: x.reshape(B * A, *x.shape[2:]), pieces)
    # As many rows of logits, however many slots a training block has.
    size = self.config.loss_chunk * self.drafter.max_drafts
    size = min(size // blocks.labels.shape[-1], B * A)
    right, sums = map_pieces(chunk, flat, size)
    return right.reshape(B, A, -1), sums

  def _cast(self, x: jax.Array) -> jax.Array:
    """Matrices in the compute dtype; norms' vectors stay float32."""
    return x.astype(self.config.compute_dtype) if x.ndim > 1 else x


def see_text(places: jax.Array, starts: jax.Array, length: int) -> jax.Array:
  """bool[B, C, S]: the rows start..place of a text of S rows.

  Args:
    places: i32[B, C]. starts: i32[B, C], of each one's document.
    length: S.
  """
  rows = jnp.arange(length)
  return (rows <= places[..., None]) & (rows >= starts[..., None])
