"""block_attention: interpreted kernels against the reference in float32.

With a scale of ln 2 the weights of whole scores are powers of 2, and sums of
them exact: what is right is right to the last bits. Queries are sparse, so that
no key outweighs the others and every one counts.
"""

import math

import jax.numpy as jnp
import numpy as np

from tests.pallas_kernels import wgmma_races
from tests.pallas_kernels.checks import INTERPRETED, whole_numbers

SCALE = math.log(2)
TILE = 64  # slots


def block_attention(
  architecture: str,
  tokens: int,
  slots: int,
  lengths: list[int],
  *,
  heads: int = 1,
  kv_heads: int = 1,
  head_width: int = 64,
  tree: bool = False,
  block: bool = False,
  window: int | None = None,
  prefix: tuple[int, int] | None = None,
  member: list[int] | None = None,
  sinks: bool = False,
  split_tiles: int = 2,
  stages: int = 2,
  rising: bool = False,
  steep: bool = False,
  default: bool = False,
) -> None:
  """Compares; what no row sees and no tile needs is NaN for the kernel.

  Args:
    architecture: of the kernel.
    tokens, slots, lengths: P, S, and of each sequence.
    heads, kv_heads, head_width: N, G, H.
    tree: a random one, or a chain.
    block: a drafter's, whose rows see later ones too, and some see none.
    window, prefix, member: of the operation; slots and length of a prefix. Of
      a tree with a window, nodes stand where their depths say.
    sinks: of the operation, near the largest scores.
    split_tiles, stages: of the configuration.
    rising: later keys outweigh earlier ones by far.
    steep: scores are multiples of 4, and scaled by a number that rounds.
    default: the default configuration, not small tiles and splits.
  """
  from dflash_jax.tree import ancestors
  from pallas_kernels.block_attention import api, reference
  from pallas_kernels.block_attention.config import Config

  wgmma_races.watch()
  rng = np.random.default_rng(tokens + slots)
  B, G, H = len(lengths), kv_heads, head_width
  query = whole_numbers(rng, B, tokens, heads, H, largest=1)
  query = query * (rng.random(query.shape) < (2 if steep else 10) / H)
  key, value = (whole_numbers(rng, B, G, tokens, H) for _ in range(2))
  past = [whole_numbers(rng, B, G, slots, H) for _ in range(2)]
  if rising:
    past[0] = past[0] * (1 + jnp.arange(slots) // TILE)[:, None]
    past[0] = past[0].astype(jnp.bfloat16)
  common, begun = None, 0
  if prefix is not None:
    begun = prefix[1]
    shared = [whole_numbers(rng, G, prefix[0], H) for _ in range(2)]
    common = (*shared, jnp.int32(begun))
  if steep:
    key, past[0] = key * 4, past[0] * 4
  scale = SCALE * 3 / 4 if steep else SCALE
  keywords = dict(prefix=common, window=window, scale=scale)
  if member is not None:
    keywords["member"] = jnp.array(member, bool)
  more = (
    jnp.array(lengths, jnp.int32),
    None,
  )
  if tree:
    grown = random_tree(rng, B, tokens)
    more = (more[0], ancestors(grown, window))
    if window is not None:
      keywords["depths"] = jnp.pad(grown.depths, ((0, 0), (1, 0)))
  if sinks:
    highest = jnp.array(rng.integers(0, 9, heads), jnp.float32)
    keywords["sinks"] = highest * SCALE
  if block:
    exists = np.arange(tokens) < rng.integers(1, tokens + 1, (B, 1, 1))
    seen = jnp.array(exists | np.eye(tokens, dtype=bool))
    more = (more[0], reference.pack_mask(seen))
  floats = [x.astype(jnp.float32) for x in (query, key, value, *past)]
  if common is not None:
    keywords["prefix"] = (
      *(x.astype(jnp.float32) for x in common[:2]),
      common[2],
    )
  want = reference.block_attention(*floats, *more, **keywords)

  oldest = [n + 1 - window if window else 0 for n in lengths]
  past = [unread_is_nan(x, oldest, lengths) for x in past]
  if common is not None:
    first = [min(oldest) + begun if window else 0] * G
    shared = [unread_is_nan(x[:, None], first, [begun] * G) for x in shared]
    common = (*(x[:, 0] for x in shared), common[2])
  keywords["prefix"] = common
  rows = 64 if architecture == "sm90" and tokens * heads // G <= 64 else 128
  got = api.run_kernel(
    architecture,
    query,
    key,
    value,
    *past,
    *more,
    **keywords,
    config=None if default else Config(rows, TILE, split_tiles * TILE, stages),
    interpret=INTERPRETED,
  )
  np.testing.assert_allclose(got, want, 3e-6, 3e-6)


def random_tree(rng, batch: int, tokens: int):
  """One of each sequence, in which any node may follow any before it."""
  from dflash_jax.tree import Tree

  parents = rng.integers(0, np.arange(1, tokens), (batch, tokens - 1))
  depths = np.zeros((batch, tokens), np.int32)
  for node in range(1, tokens):
    above = np.take_along_axis(depths, parents[:, node - 1 : node], 1)
    depths[:, node] = above[:, 0] + 1
  parents = jnp.array(parents, jnp.int32)
  return Tree(parents, jnp.array(depths[:, 1:]), parents)


def random_ancestors(rng, batch: int, tokens: int):
  """u32[B, P, W] of such trees."""
  from dflash_jax.tree import ancestors

  return ancestors(random_tree(rng, batch, tokens))


def unread_is_nan(keys, oldest: list[int], lengths: list[int]):
  """Keys [B, G, S, H], NaN in each tile of which no row sees a slot."""
  tiles = np.arange(keys.shape[2]) // TILE
  needed = [
    (tiles >= max(first, 0) // TILE) & (tiles * TILE < length)
    for first, length in zip(oldest, lengths, strict=True)
  ]
  return jnp.where(np.array(needed)[:, None, :, None], keys, jnp.nan)


class _RowsByThemselves:
  """Stands for numpy in the interpreter.

  numpy's product of matrices rounds a row by its place among the others, which
  tensor cores do not. Products of bfloat16, summed in float64, hardly round.
  """

  def __getattr__(self, name):
    return getattr(np, name)

  def matmul(self, left, right, dtype):
    return np.matmul(left, right, dtype=np.float64).astype(dtype)


def rows_are_exact(architecture: str) -> None:
  """A row gets the same bits alone, among others, and in any batch."""
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

  from pallas_kernels.block_attention import api
  from pallas_kernels.block_attention.config import Config

  wgmma_races.watch()
  gpu_callbacks.np = _RowsByThemselves()
  rng = np.random.default_rng(0)
  heads, slots, H = 15, 200, 64

  def normal(*shape):
    return jnp.array(rng.normal(size=shape), jnp.bfloat16)

  query = normal(3, 5, heads, H)
  key, value = normal(3, 1, 5, H), normal(3, 1, 5, H)
  past = normal(3, 1, slots, H), normal(3, 1, slots, H)
  lengths = jnp.array([150, 3, 200], jnp.int32)

  def attend(sequences: slice, tokens: int):
    rows = 64 if architecture == "sm90" and tokens * heads <= 64 else 128
    return api.run_kernel(
      architecture,
      query[sequences, :tokens],
      *(x[sequences, :, :tokens] for x in (key, value)),
      *(x[sequences] for x in past),
      lengths[sequences],
      None,
      prefix=None,
      window=None,
      scale=None,
      config=Config(rows, TILE, 2 * TILE, 2),
      interpret=INTERPRETED,
    )

  whole = np.asarray(attend(slice(None), 5))
  assert np.isfinite(whole).all()
  np.testing.assert_array_equal(attend(slice(0, 1), 5), whole[:1])
  np.testing.assert_array_equal(attend(slice(0, 3), 1), whole[:, :1])
  np.testing.assert_array_equal(attend(slice(2, 3), 2), whole[2:, :2])
