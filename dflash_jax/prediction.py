"""What the target says of the next token, made only as far as it is asked."""

import dataclasses

import jax
import jax.numpy as jnp

from dflash_jax import layers
from dflash_jax.noise import Stream
from dflash_jax.sampling import Sampling, choose
from pallas_kernels.lm_head_verify import Draws, lm_head_verify


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
    sampling: Sampling,
    seeds: jax.Array,
    positions: jax.Array,
    places: jax.Array | None = None,
  ) -> jax.Array:
    """The target's own token after each row.

    Args:
      sampling: the target's law.
      seeds: u32[B], one stream per request.
      positions: i32[B, T], of the tokens to be chosen.
      places: i32[B, T], which of positions i32[B, L] each row's token is at;
        None where they are in order. Noise is made once for each of the L.

    Returns:
      i32[B, T]; the lowest id wins a tie.
    """
    if sampling.is_restricted:
      return choose(self.logits(), sampling, seeds, positions, places)
    B, T, D = self.hidden.shape
    draws = None
    if not sampling.is_greedy:
      L = positions.shape[1]
      if places is not None:
        places = (places + L * jnp.arange(B)[:, None]).reshape(-1)
      draws = Draws(
        seeds=jnp.repeat(seeds, L),
        moments=positions.reshape(-1),
        temperature=sampling.temperature,
        stream=Stream.CHOICE,
        addresses=places,
      )
    found = lm_head_verify(
      self.hidden.reshape(B * T, D), self.head, draws=draws, vocab_axis=1
    )
    chosen = found.best if found.sample is None else found.sample
    return chosen.reshape(B, T)
