"""block_verify in plain XLA: the truth, and what runs without a kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_verify.rule import Ending, Rule, Softmax, uniform
from pallas_kernels.lm_head_verify.reference import argmax


@dataclasses.dataclass(frozen=True)
class XlaPasses:
  """The three passes; arguments of the operation, logits in float32."""

  rule: Rule
  target_logits: jax.Array
  draft_logits: jax.Array
  seeds: jax.Array
  moments: jax.Array

  def measure(self) -> tuple[Softmax, Softmax]:
    return (
      _softmax(self.target_logits, self.rule.temperature),
      _softmax(self.draft_logits, self.rule.draft_temperature),
    )

  def excess(
    self, weights: jax.Array, target: Softmax, draft: Softmax
  ) -> jax.Array:
    last = self.draft_logits.shape[1]

    def probabilities(logits, softmax, temperature):
      rows = Softmax(*(x[:, 1:last, None] for x in softmax))
      return rows.at(logits[:, 1:last], temperature)

    p = probabilities(self.target_logits, target, self.rule.temperature)
    q = probabilities(self.draft_logits, draft, self.rule.draft_temperature)
    return jnp.maximum(weights[..., None] * p - q, 0.0).sum(axis=-1)

  def race(self, ending: Ending) -> jax.Array:
    p = _law(
      self.target_logits,
      ending.accepted,
      ending.target,
      self.rule.temperature,
    )
    q = _law(
      self.draft_logits,
      ending.draft_row,
      ending.draft,
      self.rule.draft_temperature,
    )
    left = jnp.maximum(ending.scale[:, None] * p - q, 0.0)
    weights = jnp.where((left > 0).any(axis=-1, keepdims=True), left, p)
    draws = uniform(ending.streams, self.seeds, self.moments, p.shape[-1])
    return argmax(weights / -jnp.log1p(-draws))


def _softmax(logits: jax.Array, temperature: float) -> Softmax:
  top = logits.max(axis=-1)
  scaled = (logits - top[..., None]) * np.float32(1 / temperature)
  return Softmax(top, 1.0 / jnp.exp(scaled).sum(axis=-1))


def _law(
  logits: jax.Array, rows: jax.Array, softmax: Softmax, temperature: float
) -> jax.Array:
  """f32[B, V]: probabilities of one row of each sequence."""
  row = jnp.take_along_axis(logits, rows[:, None, None], axis=1)[:, 0]
  return Softmax(*(x[:, None] for x in softmax)).at(row, temperature)
