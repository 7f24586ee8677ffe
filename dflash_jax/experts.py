"""A mixture of experts: each token goes to the few that its router chooses.

Pairs of a token and an expert are laid into tiles of a fixed number of rows,
each of one expert, and tiles are multiplied one after the other. Shapes are
static, whatever is chosen; only experts that somebody chose are read; and what
a token gets depends on its own choice alone, but for the rounding of products
of another size.

Measured on a 2-core CPU in float32, 32 experts of 512 x 512, 4 chosen; tiles,
all experts of all tokens in one product, one gathered matrix per pair, and
jax.lax.ragged_dot: 1.6, 54, 3.7 and 65 ms at 1 token; 17, 71, 47 and 73 at 8;
48, 95, 484 and 233 at 64. With 128 experts of 512 x 192, 8 chosen: 1.0, 48, 1.2
and 82 ms at 1 token; 33, 71, 306 and 521 at 64. An accelerator takes several
tiles at once, as one batch; that was not measured on one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from dflash_jax import layers
from dflash_jax.config import TargetConfig

LARGEST_TILE = 32  # rows: enough to read an expert's weights seldom
TILES_AT_ONCE = 16  # on accelerators, where a loop costs more than copies


class Stack(nnx.Module):
  """One linear layer of every expert; kernels are stored [E, in, out]."""

  def __init__(
    self, shape: tuple[int, int, int], *, rngs: nnx.Rngs, bias: bool
  ):
    count, _, width_out = shape
    self.kernel = layers.normal(rngs, shape)
    self.bias = nnx.Param(jnp.zeros((count, width_out))) if bias else None

  def __call__(self, x: jax.Array, expert: jax.Array) -> jax.Array:
    """x f[R, in] -> f32[R, out], of expert i32[]."""
    y = layers.matmul(x, self.kernel[...][expert])
    return y if self.bias is None else y + self.bias[expert].astype(jnp.float32)


class Experts(nnx.Module):
  """Router, and the gate, up and down matrices of every expert."""

  def __init__(self, config: TargetConfig, *, rngs: nnx.Rngs):
    experts = config.experts
    assert experts is not None
    D, E, F = config.width, experts.count, experts.width
    self.experts = experts
    self.opening = config.gate
    self.router = layers.Linear(D, E, rngs=rngs, bias=experts.bias)
    self.gate = Stack((E, D, F), rngs=rngs, bias=experts.bias)
    self.up = Stack((E, D, F), rngs=rngs, bias=experts.bias)
    self.down = Stack((E, F, D), rngs=rngs, bias=experts.bias)

  def __call__(self, x: jax.Array) -> jax.Array:
    """x f32[B, T, D] -> f32[B, T, D]."""
    rows = x.reshape(-1, x.shape[-1])
    chosen, weights = self.route(rows)
    tiles = Tiles.lay(chosen, self.experts.count)
    at_once = None if jax.default_backend() == "cpu" else TILES_AT_ONCE
    found = jax.lax.map(
      lambda tile: self.run(*tile),
      (tiles.fill(rows), tiles.expert),
      batch_size=at_once,
    )
    found = found.reshape(-1, x.shape[-1])[tiles.place]
    return (found * weights[..., None]).sum(axis=1).reshape(x.shape)

  def route(self, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """rows f32[M, D] -> experts i32[M, k] and their weights f32[M, k].

    In float32 whatever the parameters' dtype: a choice that flips between two
    passes over the same token changes far more than rounding would.
    """
    scores = layers.matmul(rows, self.router.kernel[...].astype(jnp.float32))
    if self.router.bias is not None:
      scores += self.router.bias[...].astype(jnp.float32)
    top, chosen = jax.lax.top_k(scores, self.experts.top_k)
    among = top if self.experts.renormalize else scores
    total = jax.nn.logsumexp(among, axis=-1, keepdims=True)
    return chosen, jnp.exp(top - total)

  def run(self, rows: jax.Array, expert: jax.Array) -> jax.Array:
    """rows f32[R, D] -> f32[R, D], all through one expert i32[]."""
    gate, up = self.gate(rows, expert), self.up(rows, expert)
    return self.down(layers.open_gate(self.opening, gate, up), expert)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Where pairs of a token and an expert lie.

  Attributes:
    size: rows of a tile.
    expert: i32[n], that of each tile.
    place: i32[M, k], of each pair, counted over the rows of all tiles.
  """

  size: int
  expert: jax.Array
  place: jax.Array

  @classmethod
  def lay(cls, chosen: jax.Array, num_experts: int) -> "Tiles":
    """Tiles for the experts i32[M, k] that M tokens chose.

    As many as could be needed: of each expert that somebody chose, the last
    may not be full. Those that are not needed hold zeros.
    """
    pairs = chosen.reshape(-1)
    size = max(1, min(LARGEST_TILE, len(pairs) // num_experts))
    num_tiles = len(pairs)
    if size > 1:
      num_tiles = len(pairs) // size + num_experts
    hits = jax.nn.one_hot(pairs, num_experts, dtype=jnp.int32)
    earlier = jnp.cumsum(hits, axis=0) - hits
    rank = jnp.take_along_axis(earlier, pairs[:, None], axis=1)[:, 0]
    needed = -(-hits.sum(axis=0) // size)
    first = jnp.cumsum(needed) - needed
    tile = first[pairs] + rank // size
    expert = jnp.zeros((num_tiles,), jnp.int32).at[tile].set(pairs)
    place = tile * size + rank % size
    return cls(size, expert, place.reshape(chosen.shape))

  def fill(self, rows: jax.Array) -> jax.Array:
    """rows f32[M, D] -> f32[n, size, D]: a copy for each pair."""
    M, k = self.place.shape
    tiles = jnp.zeros((len(self.expert) * self.size, rows.shape[-1]))
    copies = jnp.repeat(rows, k, axis=0)
    tiles = tiles.at[self.place.reshape(M * k)].set(copies)
    return tiles.reshape(len(self.expert), self.size, -1)
