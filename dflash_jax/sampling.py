"""How the target picks a token from its logits: greedy, or by seeded noise.

Noise depends on (seed, position, token) alone, so a draw does not depend on
how many tokens were verified together, on the batch, or on the drafter.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax import noise
from dflash_jax.config import ConfigError
from dflash_jax.noise import Stream
from pallas_kernels.lm_head_verify.reference import argmax

# Of a float32 weight: nuclei are told apart to 2^-16 of it, about as finely as
# float32 logits tell weights.
TIED_BITS = 7


@dataclasses.dataclass(frozen=True)
class Sampling:
  """A distribution made from logits; static in jitted code.

  The restrictions apply after the temperature and in this order; tokens that
  tie with the last one kept are kept.

  Attributes:
    temperature: 0 is greedy.
    top_k: only the k likeliest tokens; 0 for all.
    top_p: only the likeliest tokens that are needed for this share of the
      probability; 1 for all.
    min_p: only tokens at least min_p times as likely as the likeliest.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0

  def __post_init__(self):
    if not 0 <= self.temperature < float("inf"):
      raise _impossible("temperature", self.temperature, "use 0 or more")
    if self.top_k < 0:
      raise _impossible("top_k", self.top_k, "use 0 for all, or at least 1")
    if not 0 < self.top_p <= 1:
      raise _impossible("top_p", self.top_p, "use more than 0, at most 1")
    if not 0 <= self.min_p <= 1:
      raise _impossible("min_p", self.min_p, "use 0 to 1")

  @property
  def is_greedy(self) -> bool:
    """Whether the likeliest token is certain."""
    return self.temperature == 0

  @property
  def is_restricted(self) -> bool:
    """Whether some tokens are kept out of a draw."""
    limits = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
    return limits and not self.is_greedy


def _impossible(name: str, value: float, remedy: str) -> ConfigError:
  return ConfigError(f"{name}={value} is impossible; {remedy}")


GREEDY = Sampling()


def weigh(logits: jax.Array, sampling: Sampling) -> jax.Array:
  """logits f32[..., V] -> f32[..., V], proportional to probability.

  The likeliest token weighs 1, an excluded one 0; greedy keeps one token.
  """
  if sampling.is_greedy:
    return jax.nn.one_hot(argmax(logits), logits.shape[-1], dtype=jnp.float32)
  top = logits.max(axis=-1, keepdims=True)
  weights = jnp.exp((logits - top) / sampling.temperature)
  if sampling.top_k:
    count = min(sampling.top_k, logits.shape[-1])
    last = jax.lax.top_k(logits, count)[0][..., -1:]
    weights = jnp.where(logits < last, 0.0, weights)
  if sampling.top_p < 1:
    weights = _keep_nucleus(weights, sampling.top_p)
  if sampling.min_p > 0:
    weights = jnp.where(weights < sampling.min_p, 0.0, weights)
  return weights


def _keep_nucleus(weights: jax.Array, share: float) -> jax.Array:
  """Drops tokens whose likelier ones hold `share` of all weight already."""
  needed = share * weights.sum(axis=-1, keepdims=True)
  # The likeliest weighs 1, so all that weigh this much or less cannot hold what
  # is not needed.
  least = np.float32((1 - share) / weights.shape[-1] / 2)
  return drop_outside(weights, needed, least)


def drop_outside(
  weights: jax.Array, needed: jax.Array, least: np.float32
) -> jax.Array:
  """Drops tokens whose likelier ones weigh needed f32[..., 1] or more.

  Found by bisection over the bits of a float, which order positive floats:
  some 20 sums over the vocabulary, where a sort costs a CPU many times as much.

  Args:
    weights: f32[..., V], at most 1.
    needed: f32[..., 1].
    least: a weight of which no likelier token is dropped.
  """

  def halve(_, bounds):
    low, high = bounds  # mass above low: needed or more; above high: less
    middle = (low + high) // 2
    limit = jax.lax.bitcast_convert_type(middle, jnp.float32)
    above = jnp.where(weights > limit, weights, 0.0).sum(-1, keepdims=True)
    enough = above < needed
    return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

  first, one = least.view(np.int32), np.float32(1).view(np.int32)
  steps = int(one - first).bit_length() - TIED_BITS
  low, high = (jnp.full(needed.shape, bits) for bits in (first, one))
  low, _ = jax.lax.fori_loop(0, steps, halve, (low, high))
  limit = jax.lax.bitcast_convert_type(low, jnp.float32)
  return jnp.where(weights > limit, weights, 0.0)


def choice_times(
  vocab_size: int,
  seeds: jax.Array,
  positions: jax.Array,
  places: jax.Array | None,
) -> jax.Array:
  """Race times f32[B, T, V] of the target's choices; arguments as in choose."""
  times = noise.race_times(Stream.CHOICE, seeds[:, None], positions, vocab_size)
  if places is None:
    return times
  times = jax.lax.optimization_barrier(times)  # made once for each position
  return jnp.take_along_axis(times, places[..., None], axis=1)


def choose(
  logits: jax.Array,
  sampling: Sampling,
  seeds: jax.Array,
  positions: jax.Array,
  places: jax.Array | None = None,
) -> jax.Array:
  """The target's own token after each row.

  Args:
    logits: f32[B, T, V].
    sampling: greedy, or a law that argmax(p / race time) draws from.
    seeds: u32[B], one stream per request.
    positions: i32[B, T], of the tokens to be chosen.
    places: i32[B, T] into positions i32[B, L]; None where they are in order.

  Returns:
    i32[B, T]; the lowest id wins a tie.
  """
  if sampling.is_greedy:
    return argmax(logits)
  times = choice_times(logits.shape[-1], seeds, positions, places)
  if sampling.top_p == 1:
    return _win(logits, times, sampling)
  return jax.lax.platform_dependent(
    logits,
    times,
    cpu=functools.partial(_win_in_nucleus, sampling=sampling),
    default=functools.partial(_win, sampling=sampling),
  )


def _win(logits: jax.Array, times: jax.Array, sampling: Sampling) -> jax.Array:
  """i32[B, T]: the winner of a race among the tokens that are kept."""
  return argmax(weigh(logits, sampling) / times)


def _win_in_nucleus(
  logits: jax.Array, times: jax.Array, sampling: Sampling
) -> jax.Array:
  """The same, without a search for the nucleus."""
  everyone = dataclasses.replace(sampling, top_p=1.0, min_p=0.0)
  weights = weigh(logits, everyone)
  needed = sampling.top_p * weights.sum(axis=-1, keepdims=True)
  speed = jnp.where(weights < sampling.min_p, -1.0, weights / times)
  return race_inside(weights, speed, needed)


def race_inside(
  weights: jax.Array, speed: jax.Array, needed: jax.Array
) -> jax.Array:
  """i32[...]: the fastest whose likelier ones weigh less than needed.

  Whether one token is in the nucleus takes a single sum, so the race is run
  among all: a winner from outside rules out what weighs no more, and it is run
  again. A loop of unknown length, which a GPU's host would have to steer.

  Args:
    weights, speed: f32[..., V]; who is no faster than -1 does not run.
    needed: f32[..., 1], weight of a nucleus.
  """

  def race(carry):
    ruled_out, _, _ = carry
    winner = argmax(jnp.where(weights > ruled_out, speed, -1.0))
    weight = jnp.take_along_axis(weights, winner[..., None], axis=-1)
    above = jnp.where(weights > weight, weights, 0.0).sum(-1, keepdims=True)
    is_inside = ~(above >= needed)  # so that logits that are no numbers end it
    ruled_out = jnp.where(is_inside, ruled_out, weight)
    return ruled_out, winner, is_inside.all()

  nobody = jnp.full(needed.shape, -1.0)
  start = nobody, jnp.zeros(needed.shape[:-1], jnp.int32), jnp.array(False)
  return jax.lax.while_loop(lambda carry: ~carry[2], race, start)[1]
