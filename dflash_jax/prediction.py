"""What the target says of the next token, made only as far as it is asked."""

import dataclasses

import jax
import jax.numpy as jnp

from dflash_jax import laws, layers
from dflash_jax.laws import Laws
from dflash_jax.noise import Stream
from dflash_jax.sampling import Sampling, choose
from pallas_kernels.lm_head_verify import Draws, RowStats, lm_head_verify


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The target's laws of the token after each row.

  A rule that only asks which token the target chooses never makes logits on a
  device with a kernel for that; one that asks for logits gets them.

  Attributes:
    hidden: f32[B, T, D], after the final norm.
    head: f[D, V].
  """

  hidden: jax.Array
  head: jax.Array

  def logits(self) -> jax.Array:
    """f32[B, T, V]."""
    return layers.matmul(self.hidden, self.head)

  def choose(
    self,
    sampling: Sampling | Laws,
    seeds: jax.Array,
    positions: jax.Array,
    places: jax.Array | None = None,
  ) -> jax.Array:
    """The target's own token after each row.

    Args:
      sampling: the target's law, or that of each row.
      seeds: u32[B], one stream per request.
      positions: i32[B, T], of the tokens to be chosen.
      places: i32[B, T], which of positions i32[B, L] each row's token is at;
        None where they are in order. Noise is made once for each of the L.

    Returns:
      i32[B, T]; the lowest id wins a tie.
    """
    if isinstance(sampling, Laws):
      return self._choose_by_row(sampling, seeds, positions, places)
    if sampling.is_restricted:
      return choose(self.logits(), sampling, seeds, positions, places)
    temperature = None if sampling.is_greedy else sampling.temperature
    found = self._read_head(temperature, seeds, positions, places)
    chosen = found.best if found.sample is None else found.sample
    return chosen.reshape(self.hidden.shape[:2])

  def _choose_by_row(
    self,
    rows: Laws,
    seeds: jax.Array,
    positions: jax.Array,
    places: jax.Array | None,
  ) -> jax.Array:
    """The same, where each row has its law.

    Dividing hidden states divides logits, so a head that knows one temperature
    serves all: of 1, and none of a greedy row.
    """
    if rows.is_restricted:
      return laws.choose(self.logits(), rows, seeds, positions, places)
    if rows.is_greedy:
      found = self._read_head(None, seeds, positions, places)
      return found.best.reshape(self.hidden.shape[:2])
    cooled = Prediction(self.hidden / rows.warmth, self.head)
    found = cooled._read_head(1.0, seeds, positions, places)
    assert found.sample is not None
    shape = self.hidden.shape[:2]
    best, sample = found.best.reshape(shape), found.sample.reshape(shape)
    return jnp.where(rows.is_certain, best, sample)

  def _read_head(
    self,
    temperature: float | None,
    seeds: jax.Array,
    positions: jax.Array,
    places: jax.Array | None,
  ) -> RowStats:
    """Of rows [B * T], with a draw at a temperature unless it is None."""
    B, T, D = self.hidden.shape
    draws = None
    if temperature is not None:
      L = positions.shape[1]
      if places is not None:
        places = (places + L * jnp.arange(B)[:, None]).reshape(-1)
      draws = Draws(
        seeds=jnp.repeat(seeds, L),
        moments=positions.reshape(-1),
        temperature=temperature,
        stream=Stream.CHOICE,
        addresses=places,
      )
    return lm_head_verify(
      self.hidden.reshape(B * T, D), self.head, draws=draws, vocab_axis=1
    )
