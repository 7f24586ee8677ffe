"""One training step: taps -> blocks -> drafts -> loss -> update."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dflash_jax import layers
from dflash_jax.config import TrainConfig
from dflash_jax.drafters import Borrowed, DFlash
from dflash_jax.target import Params, Target
from train import anchors as anchors_lib
from train.anchors import Blocks, document_starts
from train.drafts import (
  Context,
  find_columns,
  read_context,
  read_drafts,
  run_blocks,
)
from train.objective import Objective, slot_sums
from train.optimizer import make_optimizer
from train.packing import read_packed
from train.pieces import add_pieces, map_pieces
from train.state import Batch, TrainState, fold_tap_scale
from train.sums import SlotSums


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The step's static half: hashable, so jit can close over it.

  Attributes:
    target, drafter: the formulas.
    settings: the frozen items of a TrainConfig.
  """

  target: Target
  drafter: DFlash
  settings: tuple[tuple[str, Any], ...]

  @classmethod
  def create(
    cls, target: Target, drafter: DFlash, config: TrainConfig
  ) -> "Trainer":
    """Binds the formulas to a config.

    Raises:
      ConfigError: for a loss that is none, or does not fit the drafter.
    """
    Objective.of(config).check_drafter(drafter.config)
    settings = tuple(sorted(dataclasses.asdict(config).items()))
    return cls(target, drafter, settings)

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

  def init_state(
    self, key: jax.Array, tap_scale: jax.Array, columns: int | None = None
  ) -> TrainState:
    """A fresh drafter and optimiser; `columns` is V' of a trimmed head."""
    params = self.drafter.init(key, columns=columns)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      optimizer=make_optimizer(self.config).init(params),
      tap_scale=jnp.asarray(tap_scale, jnp.float32),
      average=jax.tree.map(jnp.copy, params) if self.config.ema else None,
    )

  # --- The update -------------------------------------------------------------

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def update(
    self,
    state: TrainState,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
  ) -> tuple[TrainState, SlotSums, dict[str, jax.Array]]:
    """One optimiser step; anchors depend on (seed, step) alone.

    Returns:
      The new state, the batch's sums, and norms of gradient and update.
    """
    config = self.config
    gradients, sums = self.gradients(state, target_params, borrowed, batch)
    updates, optimizer = make_optimizer(config).update(
      gradients, state.optimizer, state.params
    )
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
      average = optax.incremental_update(params, average, 1 - config.ema)
    new_state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=params,
      optimizer=optimizer,
      average=average,
    )
    norms = {
      "gradient_norm": optax.tree.norm(gradients),
      "update_norm": optax.tree.norm(updates),
    }
    return new_state, sums, norms

  def gradients(
    self,
    state: TrainState,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
  ) -> tuple[Params, SlotSums]:
    """Of sum(w cost) / sum(w) over the whole batch, in pieces of its rows.

    Both sums add up over pieces, so the quotient is taken once, at the end.
    """
    config = self.config
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    blocks = self._draw_blocks(key, batch)
    share = self.objective.plain_share(state.step / config.steps)

    @functools.partial(jax.grad, has_aux=True)
    def differentiate(params, batch, blocks):
      sums = self.block_sums(
        fold_tap_scale(params, state.tap_scale),
        target_params,
        borrowed,
        batch,
        blocks,
        share,
      )
      return sums.loss, sums

    gradients, sums = add_pieces(
      lambda piece: differentiate(state.params, *piece),
      (batch, blocks),
      config.accumulate,
    )
    weight = jnp.maximum(sums.weight, 1e-6)
    return jax.tree.map(lambda leaf: leaf / weight, gradients), sums

  def block_sums(
    self,
    params: Params,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
    blocks: Blocks,
    plain_share: jax.Array | float = 0.0,
  ) -> SlotSums:
    """Sums over all blocks of a batch; params are the drafter's, folded."""
    size = self.config.anchor_chunk or blocks.anchors.shape[1]
    _, sums = self._sum_anchors(
      params, target_params, borrowed, batch, blocks, size, plain_share
    )
    return sums

  # --- Held-out answers -------------------------------------------------------

  @functools.partial(jax.jit, static_argnums=0)
  def matches(
    self,
    params: Params,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
  ) -> tuple[jax.Array, SlotSums]:
    """Which drafts would be right at every anchor of the answers.

    A corrected draft reads the answer's tokens, not its own: up to its first
    mistake these are the same, and nobody asks beyond.

    Args:
      params: the drafter's own, folded.
      target_params, borrowed, batch: as in `update`.

    Returns:
      bool[B, S, K'], and the sums over all valid anchors.
    """
    anchors, valid = anchors_lib.every_anchor(batch.loss_mask, batch.documents)
    blocks = self._cut(batch, anchors, valid)
    # About as many at a time as in training, which fit.
    config = self.config
    rows = config.batch_size * max(config.packing, 1) // config.accumulate
    size = max(rows * config.num_anchors // len(anchors), 1)
    size = min(config.anchor_chunk or size, anchors.shape[1])
    return self._sum_anchors(
      params, target_params, borrowed, batch, blocks, size
    )

  # --- Parts ------------------------------------------------------------------

  def taps(self, target_params: Params, batch: Batch) -> jax.Array:
    """f[B, S, layers * D]: the target's states, cached or computed here."""
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

  def _split(
    self, target_params: Params, batch: Batch
  ) -> tuple[jax.Array, jax.Array | None]:
    """The drafter's taps, and the last layer's output if it teaches."""
    states = self.taps(target_params, batch)
    taps, last = jnp.split(states, [self.tap_width], axis=-1)
    return taps, last if self.objective.needs_teacher else None

  def _teacher(
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

  def _draw_blocks(self, key: jax.Array, batch: Batch) -> Blocks:
    anchors, valid = anchors_lib.draw_anchors(
      key,
      batch.loss_mask,
      self.config.num_anchors,
      batch.documents,
      max(self.config.packing, 1),
    )
    return self._cut(batch, anchors, valid)

  def _cut(self, batch: Batch, anchors: jax.Array, valid: jax.Array) -> Blocks:
    return anchors_lib.cut_blocks(
      batch.tokens,
      batch.loss_mask,
      anchors,
      valid,
      self.drafter.max_drafts,
      batch.documents,
    )

  def _context(self, params: Params, taps: jax.Array, batch: Batch) -> Context:
    return read_context(
      self.drafter, params, taps, batch.documents, self.config.compute_dtype
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
    taps, last = self._split(target_params, batch)
    context = self._context(params, taps, batch)

    def chunk(blocks: Blocks) -> tuple[jax.Array, SlotSums]:
      taught = self._teacher(target_params, last, blocks)
      return self._sum(params, borrowed, context, blocks, taught, plain_share)

    return map_pieces(chunk, blocks, size, axis=1)

  def _sum(
    self,
    params: Params,
    borrowed: Borrowed,
    context: Context,
    blocks: Blocks,
    taught: jax.Array | None,
    plain_share: jax.Array | float,
  ) -> tuple[jax.Array, SlotSums]:
    """Right drafts bool[B, A, K'] and sums, a few blocks' logits at a time."""
    hidden = run_blocks(
      self.drafter, params, borrowed.embedding, context, blocks
    )
    head = self._cast(borrowed.head)

    def chunk(piece):
      hidden, previous, columns, mask, taught = piece
      drafts = read_drafts(
        self.drafter,
        params,
        borrowed.embedding,
        head,
        hidden,
        previous,
        columns,
      )
      teacher = None if taught is None else layers.matmul(taught, head)
      sums = slot_sums(
        self.objective, drafts, columns, mask, teacher, plain_share
      )
      return mask & drafts.is_right(columns), sums

    B, A = blocks.anchors.shape
    columns = find_columns(blocks.labels, borrowed)
    pieces = (hidden, blocks.previous, columns, blocks.mask, taught)
    flat = jax.tree.map(lambda x: x.reshape(B * A, *x.shape[2:]), pieces)
    size = min(self.config.loss_chunk, B * A)
    right, sums = map_pieces(chunk, flat, size)
    return right.reshape(B, A, -1), sums

  def _cast(self, x: jax.Array) -> jax.Array:
    """Matrices in the compute dtype; norms' vectors stay float32."""
    return x.astype(self.config.compute_dtype) if x.ndim > 1 else x
