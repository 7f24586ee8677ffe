"""block_verify in plain XLA: the truth, and what runs without a kernel."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import noise
from pallas_kernels.block_verify.rule import Ending, Rule, Softmax, verify
from pallas_kernels.lm_head_verify.reference import argmax


def block_verify(
  rule: Rule,
  target: jax.Array,
  draft: jax.Array,
  drafts: jax.Array,
  seeds: jax.Array,
  moments: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """As the public operation: probabilities are made, and looked at."""
  p = Powers.of(target, rule.temperature).law()
  q = Powers.of(draft, rule.draft_temperature).law()
  rule = dataclasses.replace(rule, temperature=None, draft_temperature=None)
  passes = XlaPasses(rule, p, q, seeds, moments)
  return verify(rule, passes, p, q, drafts, seeds, moments)


@dataclasses.dataclass(frozen=True)
class XlaPasses:
  """The three passes; arguments of the operation, in float32."""

  rule: Rule
  target: jax.Array
  draft: jax.Array
  seeds: jax.Array
  moments: jax.Array

  def measure(self) -> tuple[Softmax, Softmax]:
    return self._target.softmax, self._draft.softmax

  def excess(
    self, weights: jax.Array, target: Softmax, draft: Softmax
  ) -> jax.Array:
    rows = slice(1, self.draft.shape[1])
    p = self._target.powers[:, rows] * target.share[:, rows, None]
    q = self._draft.powers[:, rows] * draft.share[:, rows, None]
    return jnp.maximum(weights[..., None] * p - q, 0.0).sum(axis=-1)

  def race(self, ending: Ending) -> jax.Array:
    weights = self.last_weights(ending)
    times = noise.race_times(
      ending.streams, self.seeds, self.moments, weights.shape[-1]
    )
    return argmax(weights / times)

  def last_weights(self, ending: Ending) -> jax.Array:
    """f32[B, V], proportional to the law of the last token."""
    p = self._target.row(ending.accepted) * ending.target.share[:, None]
    q = self._draft.row(ending.draft_row) * ending.draft.share[:, None]
    left = jnp.maximum(ending.scale[:, None] * p - q, 0.0)
    return jnp.where(left.max(axis=-1, keepdims=True) > 0, left, p)

  @functools.cached_property
  def _target(self) -> "Powers":
    return Powers.of(self.target, self.rule.temperature)

  @functools.cached_property
  def _draft(self) -> "Powers":
    return Powers.of(self.draft, self.rule.draft_temperature)


class Powers(NamedTuple):
  """Laws before they are normalised: f32[B, T, V], made once for all passes."""

  powers: jax.Array
  softmax: Softmax

  @classmethod
  def of(cls, rows: jax.Array, temperature: float | None) -> "Powers":
    """Of logits at a temperature, or of probabilities if that is None."""
    if temperature is None:
      return cls(rows, Softmax.of_probabilities(rows))
    # Written so, a CPU does it in one operation.
    top = rows.max(axis=-1, keepdims=True)
    powers = jnp.exp((rows - top) / temperature)
    return cls(powers, Softmax(top[..., 0], 1.0 / powers.sum(axis=-1)))

  def law(self) -> jax.Array:
    """Probabilities."""
    return self.powers * self.softmax.share[..., None]

  def row(self, rows: jax.Array) -> jax.Array:
    """f32[B, V], of row i32[B] of each sequence."""
    return jnp.take_along_axis(self.powers, rows[:, None, None], axis=1)[:, 0]
