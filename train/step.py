"""One training step: batch -> sums -> gradients -> update."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from dflash_jax.config import TrainConfig
from dflash_jax.drafters import Borrowed
from dflash_jax.target import Params, Target
from train import mesh as mesh_lib
from train.anchors import row_keys
from train.learners import Learner, make_learner
from train.optimizer import make_optimizer
from train.pieces import add_pieces
from train.state import Batch, TrainState, fold_tap_scale
from train.sums import SlotSums


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The step's static half: hashable, so jit can close over it.

  Attributes:
    learner: what a batch says of the drafter.
    mesh: of the devices that share the work; None for one.
  """

  learner: Learner
  mesh: Mesh | None = None

  @classmethod
  def create(
    cls,
    target: Target,
    drafter: Any,
    config: TrainConfig,
    mesh: Mesh | None = None,
  ) -> "Trainer":
    """Binds the formulas to a config.

    Raises:
      ConfigError: for a loss that is none, or does not fit the drafter.
    """
    return cls(make_learner(target, drafter, config), mesh)

  @property
  def target(self) -> Target:
    """The target's formulas."""
    return self.learner.target

  @property
  def drafter(self) -> Any:
    """The drafter's formulas."""
    return self.learner.drafter

  @property
  def config(self) -> TrainConfig:
    """The run's settings."""
    return self.learner.config

  @property
  def layers_read(self) -> tuple[int, ...]:
    """The target's layers whose states a batch holds, if it holds any."""
    return self.learner.layers_read

  @property
  def tap_width(self) -> int:
    """Channels of the drafter's taps."""
    return self.learner.tap_width

  def init_state(
    self,
    key: jax.Array,
    tap_scale: np.ndarray | jax.Array | None,
    columns: int | None = None,
  ) -> TrainState:
    """A fresh drafter and optimiser; `columns` is V' of a trimmed head."""
    if tap_scale is not None:
      tap_scale = jnp.asarray(tap_scale, jnp.float32)

    def make() -> TrainState:
      params = self.learner.init(key, columns)
      return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=make_optimizer(self.config).init(params),
        tap_scale=tap_scale,
        average=jax.tree.map(jnp.copy, params) if self.config.ema else None,
      )

    return mesh_lib.create(self.mesh, make)

  # --- The update -------------------------------------------------------------

  @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
  def update(
    self,
    state: TrainState,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
  ) -> tuple[TrainState, SlotSums, dict[str, jax.Array]]:
    """One optimiser step; anchors depend on seed, step and row alone.

    Returns:
      The new state, the batch's sums, and norms of gradient and update.
    """
    config = self.config
    gradients, sums = self.gradients(state, target_params, borrowed, batch)
    updates, optimizer = mesh_lib.apply_whole(
      self.mesh,
      make_optimizer(config).update,
      gradients,
      state.optimizer,
      state.params,
      like=(gradients, state.optimizer),
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
    """Of sum(w cost) / sum(w) over the whole batch.

    Both sums add up, over the devices that share its rows and over the pieces
    that each takes its own in, so the quotient is taken once, at the end.
    """
    gradients, sums = mesh_lib.sum_gradients(
      self.mesh,
      self._sum_gradients,
      state.params,
      (state.step, state.tap_scale, target_params, borrowed),
      batch,
    )
    weight = jnp.maximum(sums.weight, 1e-6)
    return jax.tree.map(lambda leaf: leaf / weight, gradients), sums

  def _sum_gradients(
    self, params: Params, frozen: Any, batch: Batch, rows: jax.Array
  ) -> tuple[Params, SlotSums]:
    """Of sum(w cost) over rows of a batch, by their numbers i32[B] in it."""
    config, learner = self.config, self.learner
    step, tap_scale, target_params, borrowed = frozen
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    blocks = learner.draw(row_keys(key, rows), batch)
    share = learner.objective.plain_share(step / config.steps)

    @functools.partial(jax.grad, has_aux=True)
    def differentiate(params, batch, blocks):
      sums = learner.sums(
        fold_tap_scale(params, tap_scale),
        target_params,
        borrowed,
        batch,
        blocks,
        share,
      )
      return sums.loss, sums

    return add_pieces(
      lambda piece: differentiate(params, *piece),
      (batch, blocks),
      config.accumulate,
    )

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

    Args:
      params: the drafter's own, folded.
      target_params, borrowed, batch: as in `update`.

    Returns:
      bool[B, S, K'], and the sums over all valid anchors.
    """
    devices = 1 if self.mesh is None else self.mesh.size

    def match(params, frozen, batch):
      target_params, borrowed = frozen
      return self.learner.matches(
        params, target_params, borrowed, batch, devices
      )

    frozen = (target_params, borrowed)
    return mesh_lib.map_rows(self.mesh, match, params, frozen, batch)
