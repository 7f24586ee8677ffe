"""How DFlash and its variants learn: one pass over blocks of mask tokens."""

import dataclasses

import jax

from dflash_jax.drafters import Borrowed, DFlash
from dflash_jax.target import Params
from train.anchors import Blocks
from train.drafts import Context, Drafts, read_context, read_drafts, run_blocks
from train.fused_attention import can_fuse
from train.learners.base import Learner
from train.state import Batch


@dataclasses.dataclass(frozen=True)
class BlockLearner(Learner):
  """DFlash, DFlash 2, DSpark, Domino."""

  drafter: DFlash

  def read(
    self, params: Params, borrowed: Borrowed, taps: jax.Array, batch: Batch
  ) -> Context:
    """The context's keys and values."""
    del borrowed
    dtype = self.config.compute_dtype
    return read_context(self.drafter, params, taps, batch.documents, dtype)

  def run(
    self, params: Params, borrowed: Borrowed, context: Context, blocks: Blocks
  ) -> jax.Array:
    """f32[B, A, K', D]: the slots of every block that predict."""
    embedding = borrowed.embedding
    keys, _ = context[0]
    fuses = self.config.fused_attention and can_fuse(keys)
    return run_blocks(self.drafter, params, embedding, context, blocks, fuses)

  def say(
    self,
    params: Params,
    borrowed: Borrowed,
    hidden: jax.Array,
    previous: jax.Array,
    columns: jax.Array,
  ) -> Drafts:
    """The slots' logits, and what the drafter's heads make of them."""
    return read_drafts(
      self.drafter,
      params,
      borrowed.embedding,
      borrowed.head,
      hidden,
      previous,
      columns,
    )
