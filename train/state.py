"""What a step is given and what it leaves: a batch, and the run's state."""

import dataclasses
from typing import Any

import jax

from dflash_jax.target import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a checkpoint holds.

  Attributes:
    step: i32[], updates done.
    params: the drafter's float32 masters. The context projection is kept
      divided by `tap_scale`; `fold_tap_scale` gives the drafter proper.
    optimizer: optax state.
    tap_scale: f32[taps * D], 1 / rms of each tapped channel over the corpus;
      None for a drafter that reads no taps.
    average: of params, if the run keeps one.
  """

  step: jax.Array
  params: Params
  optimizer: Any
  tap_scale: jax.Array | None = None
  average: Params | None = None

  @property
  def drafter(self) -> Params:
    """What decodes: the averaged parameters, or else the latest, folded."""
    params = self.params if self.average is None else self.average
    return fold_tap_scale(params, self.tap_scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of one step.

  Attributes:
    tokens: i32[B, S]. loss_mask: bool[B, S], the answers' tokens.
    documents: i32[B, S], which of its row's documents a token is part of,
      0, 1, ...; all of them 0 where rows are not packed.
    taps: f[B, S, taps * D] from a feature cache, or None for online features.
  """

  tokens: jax.Array
  loss_mask: jax.Array
  documents: jax.Array
  taps: jax.Array | None = None


def fold_tap_scale(params: Params, tap_scale: jax.Array | None) -> Params:
  """The drafter's parameters as decoding and checkpoints want them.

  A target's channels differ in size by orders of magnitude, and an optimiser
  that steps every weight alike would spend its steps on the loudest. Dividing
  each channel by its rms is a diagonal preconditioner: it changes how the
  projection is reached, not what it can express. A drafter that reads no taps
  has no scale, and stays as it is.
  """
  if tap_scale is None:
    return params
  kernel = params["context_projection"]["kernel"] * tap_scale[:, None]
  return {**params, "context_projection": {"kernel": kernel}}
