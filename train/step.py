"""One training step: taps -> blocks -> drafter -> loss -> update."""

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
from train import losses
from train.anchors import Blocks
from train.losses import SlotSums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a checkpoint holds.

  Attributes:
    step: i32[], updates done.
    params: the drafter's float32 masters. The context projection is kept
      divided by `tap_scale`; `fold_tap_scale` gives the drafter proper.
    optimizer: optax state.
    tap_scale: f32[taps * D], 1 / rms of each tapped channel over the corpus.
  """

  step: jax.Array
  params: Params
  optimizer: Any
  tap_scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Sequences of one step.

  Attributes:
    tokens: i32[B, S]. loss_mask: bool[B, S], the answer's tokens.
    taps: f[B, S, taps * D] from a feature cache, or None for online features.
  """

  tokens: jax.Array
  loss_mask: jax.Array
  taps: jax.Array | None


def fold_tap_scale(params: Params, tap_scale: jax.Array) -> Params:
  """The drafter's parameters as decoding and checkpoints want them.

  A target's channels differ in size by orders of magnitude, and an optimiser
  that steps every weight alike would spend its steps on the loudest. Dividing
  each channel by its rms is a diagonal preconditioner: it changes how the
  projection is reached, not what it can express.
  """
  kernel = params["context_projection"]["kernel"] * tap_scale[:, None]
  return {**params, "context_projection": {"kernel": kernel}}


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """AdamW under a cosine with linear warm-up, after clipping by global norm."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=max(1, round(config.warmup * config.steps)),
    decay_steps=max(2, config.steps),
    end_value=config.learning_rate * config.final_learning_rate,
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule,
      b1=config.beta1,
      b2=config.beta2,
      weight_decay=config.weight_decay,
      mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    ),
  )


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
    """Binds the formulas to a config."""
    settings = tuple(sorted(dataclasses.asdict(config).items()))
    return cls(target, drafter, settings)

  @property
  def config(self) -> TrainConfig:
    """The settings as the dataclass they came from."""
    return TrainConfig(**dict(self.settings))

  def init_state(self, key: jax.Array, tap_scale: jax.Array) -> TrainState:
    """A fresh drafter and optimiser."""
    params = self.drafter.init(key)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      optimizer=make_optimizer(self.config).init(params),
      tap_scale=jnp.asarray(tap_scale, jnp.float32),
    )

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def update(
    self,
    state: TrainState,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step; anchors depend on (seed, step) alone."""
    key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
    anchors, valid = anchors_lib.draw_anchors(
      key, batch.loss_mask, self.config.num_anchors
    )
    blocks = self._blocks(batch, anchors, valid)
    taps, teacher = self._split(target_params, batch, blocks)

    def loss_fn(params):
      folded = fold_tap_scale(params, state.tap_scale)
      sums = self.block_sums(
        folded, borrowed, batch.tokens, taps, blocks, teacher
      )
      return sums.loss / jnp.maximum(sums.weight, 1e-6), sums

    gradients, sums = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, optimizer = make_optimizer(self.config).update(
      gradients, state.optimizer, state.params
    )
    new_state = dataclasses.replace(
      state,
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      optimizer=optimizer,
    )
    metrics = summarize(sums) | {
      "gradient_norm": optax.tree.norm(gradients),
      "update_norm": optax.tree.norm(updates),
    }
    return new_state, metrics

  @functools.partial(jax.jit, static_argnums=0)
  def matches(
    self,
    params: Params,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
  ) -> tuple[jax.Array, SlotSums]:
    """Which drafts would be right at every anchor of the answers.

    Args:
      params: the drafter's own, folded.
      target_params, borrowed, batch: as in `update`.

    Returns:
      bool[B, S, K - 1], and the sums over all valid anchors.
    """
    anchors, valid = anchors_lib.every_anchor(batch.loss_mask)
    blocks = self._blocks(batch, anchors, valid)
    taps = self.taps(target_params, batch)[..., : self.tap_width]
    hidden = self._draft(params, borrowed, batch.tokens, taps, blocks)
    columns = self._columns(blocks.labels, borrowed)

    def chunk(piece):
      hidden, columns, mask = piece
      logits = self.drafter.logits(hidden, self._cast(borrowed.head))
      right = mask & losses.is_best(logits, columns)
      return right, losses.slot_sums(logits, columns, mask, self.config)

    right, sums = self._map_blocks(chunk, (hidden, columns, blocks.mask))
    return right, sums

  def taps(self, target_params: Params, batch: Batch) -> jax.Array:
    """f[B, S, taps * D]: the target's states, cached or computed here."""
    if batch.taps is not None:
      return batch.taps
    B, _ = batch.tokens.shape
    dtype = target_params["embedding"].dtype
    cache = self.target.init_cache(B, 0, dtype)
    _, taps, _ = self.target.forward(
      target_params, batch.tokens, cache, self.layers_read
    )
    return jax.lax.stop_gradient(taps)

  @property
  def layers_read(self) -> tuple[int, ...]:
    """The drafter's taps, then the last layer if it teaches."""
    last = (self.target.config.num_layers - 1,)
    return self.drafter.taps + (last if self.config.teacher_share else ())

  @property
  def tap_width(self) -> int:
    """Channels of the drafter's taps."""
    return len(self.drafter.taps) * self.target.config.width

  def _split(
    self, target_params: Params, batch: Batch, blocks: Blocks
  ) -> tuple[jax.Array, jax.Array | None]:
    """The drafter's taps, and the target's hidden state before each label.

    A label at position t is what the target said after reading t - 1.
    """
    states = self.taps(target_params, batch)
    taps = states[..., : self.tap_width]
    if not self.config.teacher_share:
      return taps, None
    B, A, slots = blocks.labels.shape
    last = batch.tokens.shape[1] - 1
    rows = jnp.minimum(blocks.anchors[..., None] + jnp.arange(slots), last)
    output = jnp.take_along_axis(
      states[..., self.tap_width :], rows.reshape(B, -1, 1), axis=1
    )
    hidden = self.target.normalize(target_params, output)
    return taps, hidden.reshape(B, A, slots, -1)

  def block_sums(
    self,
    params: Params,
    borrowed: Borrowed,
    tokens: jax.Array,
    taps: jax.Array,
    blocks: Blocks,
    teacher: jax.Array | None = None,
  ) -> SlotSums:
    """Runs all blocks and sums their losses, head and loss in chunks."""
    hidden = self._draft(params, borrowed, tokens, taps, blocks)
    columns = self._columns(blocks.labels, borrowed)
    head = self._cast(borrowed.head)

    def chunk(piece):
      hidden, columns, mask, *teacher = piece
      logits = self.drafter.logits(hidden, head)
      known = [layers.matmul(state, head) for state in teacher]
      return (), losses.slot_sums(logits, columns, mask, self.config, *known)

    taught = () if teacher is None else (teacher,)
    pieces = (hidden, columns, blocks.mask, *taught)
    _, sums = self._map_blocks(chunk, pieces)
    return sums

  def _blocks(
    self, batch: Batch, anchors: jax.Array, valid: jax.Array
  ) -> Blocks:
    return anchors_lib.cut_blocks(
      batch.tokens,
      batch.loss_mask,
      anchors,
      valid,
      self.drafter.config.block_size,
    )

  def _draft(
    self,
    params: Params,
    borrowed: Borrowed,
    tokens: jax.Array,
    taps: jax.Array,
    blocks: Blocks,
  ) -> jax.Array:
    """f32[B, A, K - 1, D]: the mask slots of every block.

    The exact rule of a block's attention: context strictly before the anchor,
    plus the block itself. Each part is its own attention, merged by
    log-sum-exp, so no mask over [A K, S + A K] exists.
    """
    B, A = blocks.anchors.shape
    B, S = tokens.shape
    K = self.drafter.config.block_size
    params = jax.tree.map(self._cast, params)
    context = self.drafter.context_keys_values(
      params, taps, jnp.broadcast_to(jnp.arange(S), (B, S))
    )
    context = [
      (self._cast(k.swapaxes(1, 2)), self._cast(v.swapaxes(1, 2)))
      for k, v in context
    ]
    positions = blocks.anchors[..., None] + jnp.arange(K)  # [B, A, K]
    slots = jnp.arange(S)
    before = slots < blocks.anchors[..., None, None]  # [B, A, 1, S]
    age = positions[..., None] - slots

    def context_attention(index, query):
      window = self.drafter.config.layer_windows[index]
      mask = before & (age < window) if window else before
      mask = jnp.broadcast_to(mask, age.shape).reshape(B, A * K, S)
      rows = query.reshape(B, A * K, *query.shape[2:])
      key, value = context[index]
      out, lse = layers.attend_with_lse(rows, key, value, mask)
      return out.reshape(query.shape), lse.reshape(query.shape[:-1])

    anchor_tokens = jnp.take_along_axis(tokens, blocks.anchors, axis=1)
    x = self.drafter.embed(anchor_tokens.reshape(-1), borrowed.embedding)
    hidden = self.drafter.run_block(
      params, x, positions.reshape(-1, K), context_attention
    )
    return hidden.reshape(B, A, K, -1)[:, :, 1:]

  def _columns(self, labels: jax.Array, borrowed: Borrowed) -> jax.Array:
    """Columns of labels in the draft head; -1 where it lacks them."""
    ids = borrowed.head_ids
    if ids is None:
      return labels
    column = jnp.minimum(jnp.searchsorted(ids, labels), len(ids) - 1)
    return jnp.where(ids[column] == labels, column, -1)

  def _map_blocks(self, function, pieces):
    """Applies function to chunks of blocks, keeping one chunk's logits alive.

    Args:
      function: pieces of X blocks -> (per-block outputs, SlotSums).
      pieces: arrays [B, A, ...].
    """
    B, A = pieces[2].shape[:2]
    flat = jax.tree.map(lambda x: x.reshape(B * A, *x.shape[2:]), pieces)
    size = min(self.config.loss_chunk, B * A)
    count = -(-B * A // size)
    pad = count * size - B * A
    if count == 1:
      outputs, sums = function(flat)
    else:
      padded = jax.tree.map(
        lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)), flat
      )
      chunks = jax.tree.map(
        lambda x: x.reshape(count, size, *x.shape[1:]), padded
      )
      outputs, sums = jax.lax.map(jax.checkpoint(function), chunks)
      sums = jax.tree.map(lambda x: x.sum(axis=0), sums)
      outputs = jax.tree.map(
        lambda x: x.reshape(count * size, *x.shape[2:])[: B * A], outputs
      )
    outputs = jax.tree.map(lambda x: x.reshape(B, A, *x.shape[1:]), outputs)
    return outputs, sums

  def _cast(self, x: jax.Array) -> jax.Array:
    """Matrices in the compute dtype; norms' vectors stay float32."""
    return x.astype(self.config.compute_dtype) if x.ndim > 1 else x


def summarize(sums: SlotSums) -> dict[str, jax.Array]:
  """Loss, accuracy per slot, mean leading run + 1, supervised slots."""
  supervised = jnp.maximum(sums.supervised, 1.0)
  return {
    "loss": sums.loss / jnp.maximum(sums.weight, 1e-6),
    "accuracy": sums.correct / supervised,
    "anchor_tau": 1.0 + sums.accepted / jnp.maximum(sums.blocks, 1.0),
    "slots": sums.supervised.sum(),
  }
