"""block_verify on Hopper and Blackwell: three passes that stream rows.

A CTA is a warpgroup that loads a chunk of a row or two into registers, all of
it at once, and reduces it to a number or two. There is no loop to keep full:
several CTAs share a core, and while some reduce, others load.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import noise
from pallas_kernels.block_verify.config import VECTOR, Config
from pallas_kernels.block_verify.rule import Ending, Rule, Softmax

LOWEST = np.float32(-1e30)  # below every logit that matters, yet finite
NO_TOKEN = np.int32(2**31 - 1)  # loses every tie
LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class KernelPasses:
  """The three passes; arguments of the operation, in float32.

  Attributes:
    config: chunks.
    interpret: parameters of the interpreter, for a machine without the device.
  """

  rule: Rule
  config: Config
  target: jax.Array
  draft: jax.Array
  seeds: jax.Array
  moments: jax.Array
  interpret: object = None

  def measure(self) -> tuple[Softmax, Softmax]:
    return (
      self._measure(self.target, self.rule.temperature),
      self._measure(self.draft, self.rule.draft_temperature),
    )

  def _measure(self, rows: jax.Array, temperature: float | None) -> Softmax:
    if temperature is None:
      return Softmax.of_probabilities(rows)
    B, T, V = rows.shape
    size = self.config.measured
    splits = pl.cdiv(V, size)

    def body(rows, tops, totals):
      sequence, row, split = map(lax.axis_index, ("sequence", "row", "split"))
      chunk = Chunk.create(split, size, V)

      def fold(keep):
        logits = keep(chunk.load(rows.at[sequence, row]), LOWEST)
        top = jnp.maximum(jnp.max(logits), LOWEST)
        tops[sequence, row, split] = top
        powers = jnp.exp2((logits - top) * _rate(temperature))
        totals[sequence, row, split] = jnp.sum(powers)

      chunk.visit(fold)

    found = jax.ShapeDtypeStruct((B, T, splits), jnp.float32)
    kernel = self._kernel(body, (found, found), fast=True, row=T, split=splits)
    tops, totals = kernel(rows)
    return _merge(tops, totals, _rate(temperature))

  def excess(
    self, weights: jax.Array, target: Softmax, draft: Softmax
  ) -> jax.Array:
    B, P, V = self.draft.shape
    size = self.config.compared
    splits = pl.cdiv(V, size)

    def body(target, draft, numbers, sums):
      sequence, row, split = map(lax.axis_index, ("sequence", "row", "split"))
      chunk = Chunk.create(split, size, V)
      numbers = Numbers.read(numbers.at[sequence, row])

      def fold(keep):
        _, left = self._residual(
          chunk.load(target.at[sequence, row + 1]),
          chunk.load(draft.at[sequence, row + 1]),
          numbers,
        )
        sums[sequence, row, split] = jnp.sum(keep(left, np.float32(0)))

      chunk.visit(fold)

    numbers = Numbers.create(
      weights,
      Softmax(*(x[:, 1:P] for x in target)),
      Softmax(*(x[:, 1:] for x in draft)),
    )
    sums = jax.ShapeDtypeStruct((B, P - 1, splits), jnp.float32)
    kernel = self._kernel(body, sums, fast=True, row=P - 1, split=splits)
    return kernel(self.target, self.draft, numbers).sum(axis=-1)

  def race(self, ending: Ending) -> jax.Array:
    B, _, V = self.draft.shape
    size = self.config.raced
    splits = pl.cdiv(V, size)

    def body(target, draft, numbers, places, scores, winners):
      sequence, split = map(lax.axis_index, ("sequence", "split"))
      chunk = Chunk.create(split, size, V)
      accepted, draft_row, stream, seed, moment = (
        places[sequence, i] for i in range(5)
      )
      own, left = self._residual(
        chunk.load(target.at[sequence, accepted]),
        chunk.load(draft.at[sequence, draft_row]),
        Numbers.read(numbers.at[sequence]),
      )
      ids = chunk.ids()

      def spread(word):
        return lax.broadcast_in_dim(word.astype(jnp.uint32), (size,), ())

      times = noise.race_times_at(
        spread(seed), spread(moment), ids, stream=stream, vocabulary=V
      )
      # A chunk that was moved back meets tokens twice, and draws the same.
      for kind, weights in enumerate((left, own)):
        arrivals = weights / times
        best = jnp.max(arrivals)
        scores[kind, sequence, split] = best
        winners[kind, sequence, split] = jnp.min(
          jnp.where(arrivals == best, ids, NO_TOKEN)
        )

    seeds = lax.bitcast_convert_type(self.seeds, jnp.int32)
    words = ending.accepted, ending.draft_row, ending.streams
    out_types = tuple(
      jax.ShapeDtypeStruct((2, B, splits), dtype)
      for dtype in (jnp.float32, jnp.int32)
    )
    scores, winners = self._kernel(body, out_types, fast=False, split=splits)(
      self.target,
      self.draft,
      Numbers.create(ending.scale, ending.target, ending.draft),
      jnp.stack([*words, seeds, self.moments], axis=1),
    )
    best = scores.max(axis=-1)
    wins = scores == best[..., None]
    left, own = jnp.where(wins, winners, NO_TOKEN).min(axis=-1)
    return jnp.where(best[0] > 0, left, own)

  def _residual(
    self, target: jax.Array, draft: jax.Array, numbers: "Numbers"
  ) -> tuple[jax.Array, jax.Array]:
    """scale p, and max(scale p - q, 0)."""
    p = _power(target, numbers.top, self.rule.temperature) * numbers.share
    q = _power(draft, numbers.draft_top, self.rule.draft_temperature)
    return p, jnp.maximum(p - q * numbers.draft_share, np.float32(0))

  def _kernel(self, body, out_type, *, fast: bool, **axes: int):
    """A kernel of one warpgroup per point of (sequence, *axes).

    Args:
      body, out_type: of the kernel.
      fast: powers of 2 below 2^-126 may be 0, and logarithms are rough.
      **axes: the rest of the grid, whose last axis varies fastest.
    """
    return plgpu.kernel(
      body,
      out_type=out_type,
      grid=(self.draft.shape[0], *axes.values()),
      grid_names=("sequence", *axes),
      compiler_params=plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=fast
      ),
      interpret=self.interpret,
    )


def _rate(temperature: float) -> np.float32:
  """log2(e) / temperature."""
  return np.float32(LOG2_E / temperature)


def _power(
  values: jax.Array, top: jax.Array, temperature: float | None
) -> jax.Array:
  """Of logits, what is proportional to their probabilities."""
  if temperature is None:
    return values
  return jnp.exp2((values - top) * _rate(temperature))


@dataclasses.dataclass(frozen=True)
class Numbers:
  """Of two rows: scale times p's share, and all else that makes p and q."""

  top: jax.Array
  share: jax.Array
  draft_top: jax.Array
  draft_share: jax.Array

  @staticmethod
  def create(scale: jax.Array, target: Softmax, draft: Softmax) -> jax.Array:
    """f32[..., 4], to be read in a kernel."""
    share = scale * target.share
    return jnp.stack([target.top, share, draft.top, draft.share], axis=-1)

  @classmethod
  def read(cls, numbers) -> "Numbers":
    return cls(*(numbers[i] for i in range(4)))


@dataclasses.dataclass(frozen=True)
class Chunk:
  """Tokens of a row; the last chunk is moved back so that it ends with the row.

  Attributes:
    begin: the first token that is this chunk's alone.
    first: the first token that is loaded.
    size: tokens loaded.
  """

  begin: jax.Array
  first: jax.Array
  size: int

  @classmethod
  def create(cls, split: jax.Array, size: int, vocabulary: int) -> "Chunk":
    begin = split * size
    return cls(begin, lax.min(begin, jnp.int32(vocabulary - size)), size)

  @property
  def layout(self):
    return plgpu.Layout.WG_STRIDED((self.size,), VECTOR)

  def load(self, row) -> jax.Array:
    """f32[size] of a row in global memory."""
    values = row.at[pl.ds(self.first, self.size)]
    return plgpu.load(values, layout=self.layout, optimized=False)

  def ids(self) -> jax.Array:
    """i32[size], the token of each element."""
    shape = (self.size,)
    offsets = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=self.layout)
    return offsets + self.first

  def visit(self, fold: Callable[[Callable], None]) -> None:
    """Calls fold(keep); keep(values, neutral) hides what others count."""

    @pl.when(self.begin == self.first)
    def _whole():
      fold(lambda values, neutral: values)

    @pl.when(self.begin > self.first)
    def _moved():
      own = self.ids() >= self.begin
      fold(lambda values, neutral: jnp.where(own, values, neutral))


def _merge(tops: jax.Array, totals: jax.Array, rate: np.float32) -> Softmax:
  """Parts [..., splits] -> the whole rows."""
  top = tops.max(axis=-1)
  shares = jnp.exp2((tops - top[..., None]) * rate)
  return Softmax(top, 1.0 / (totals * shares).sum(axis=-1))
