"""How a small language model learns: from every token of the answers.

It reads the text once, and what it says after each token is judged once: a
chain of drafts that are right reads the same tokens. Its blocks are single
slots, therefore, and all slots weigh the same; "ce + kl" distils the target.
Source: Hinton et al. 2015, arXiv 1503.02531; for drafting, DistillSpec, arXiv
2310.08461, of which this is the offline form: the target's own answers, and
forward KL.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dflash_jax.config import ConfigError
from dflash_jax.drafters import Borrowed, LanguageModel
from dflash_jax.layers import attend_with_lse
from dflash_jax.target import Params
from train import anchors as anchors_lib
from train.anchors import Blocks, document_starts
from train.drafts import Drafts
from train.learners.base import Learner, see_text
from train.state import Batch
from train.sums import Right, SlotSums


@dataclasses.dataclass(frozen=True)
class LmLearner(Learner):
  """Distillation."""

  drafter: LanguageModel

  def check(self) -> None:
    """Raises ConfigError for what weighs or judges the slots of a block."""
    super().check()
    objective = self.objective
    if objective.slot_weights != "uniform":
      raise ConfigError(
        f"train.slot_weights={objective.slot_weights!r} weighs the slots of a "
        "block, and a language model learns token by token; use 'uniform'"
      )
    if "e2e" in dict(objective.terms):
      raise ConfigError(
        "train.loss has 'e2e', which judges whole blocks, and a language model "
        "learns token by token; use 'tv'"
      )

  @property
  def slots(self) -> int:
    """One: what follows a token."""
    return 1

  def bind(self, params: Params, borrowed: Borrowed) -> Params:
    """What decoding reads: with the embedding and the head."""
    return self.drafter.bind(params, borrowed)

  def draw(self, keys: jax.Array, batch: Batch) -> Blocks:
    """Every token, whether or not a round could begin there."""
    del keys
    return self._every_token(batch)

  def sums(
    self,
    params: Params,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
    blocks: Blocks,
    plain_share: jax.Array | float = 0.0,
  ) -> SlotSums:
    """The loss of every token; and what is right, in blocks of K' drafts."""
    return self._judge(
      params, target_params, borrowed, batch, blocks, plain_share
    )[1]

  def matches(
    self,
    params: Params,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
    devices: int = 1,
  ) -> tuple[jax.Array, SlotSums]:
    """Which drafts would be right, as Learner.matches; each is judged once."""
    del devices
    blocks = self._every_token(batch)
    return self._judge(params, target_params, borrowed, batch, blocks)

  def read(
    self, params: Params, borrowed: Borrowed, taps: jax.Array, batch: Batch
  ) -> jax.Array:
    """f32[B, S, D]: the states after every token."""
    del taps
    B, S = batch.tokens.shape
    starts = document_starts(batch.documents)
    places = jnp.broadcast_to(jnp.arange(S), (B, S))
    seen = see_text(places, starts, S)

    def attend(layer, query, key, value, sinks):
      del layer, sinks  # design_drafter draws up no network that has sinks
      return attend_with_lse(query, key, value, seen)[0]

    hidden, _, _ = self.drafter.network.run(
      self.bind(params, borrowed),
      batch.tokens,
      places - starts,
      attend,
      jnp.dtype(self.config.compute_dtype),
    )
    return hidden

  def run(
    self, params: Params, borrowed: Borrowed, context: jax.Array, blocks: Blocks
  ) -> jax.Array:
    """f32[B, A, 1, D]: the states after each block's first token."""
    del params, borrowed
    index = blocks.anchors[..., None]
    return jnp.take_along_axis(context, index, axis=1)[:, :, None]

  def say(
    self,
    params: Params,
    borrowed: Borrowed,
    hidden: jax.Array,
    previous: jax.Array,
    columns: jax.Array,
  ) -> Drafts:
    """The head's logits."""
    del previous, columns
    bound = self.bind(params, borrowed)
    logits = self.drafter.network.logits(bound, hidden)
    return Drafts(logits, corrected=None, choice=None, odds=None)

  def _every_token(self, batch: Batch) -> Blocks:
    places = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
    places = jnp.broadcast_to(places, batch.tokens.shape)
    return self.cut(batch, places, jnp.ones_like(places, bool), self.slots)

  def _judge(
    self,
    params: Params,
    target_params: Params,
    borrowed: Borrowed,
    batch: Batch,
    blocks: Blocks,
    plain_share: jax.Array | float = 0.0,
  ) -> tuple[jax.Array, SlotSums]:
    """Right drafts bool[B, S, K'] and sums, each token judged once."""
    size = self.config.anchor_chunk or blocks.anchors.shape[1]
    right, sums = self._sum_anchors(
      params, target_params, borrowed, batch, blocks, size, plain_share
    )
    return self._line_up(right, sums, batch)

  def _line_up(
    self, right: jax.Array, sums: SlotSums, batch: Batch
  ) -> tuple[jax.Array, SlotSums]:
    """bool[B, S, K'], of right bool[B, S, 1]; and sums that count blocks.

    Draft k of the block at anchor a is what follows token a + k - 1.
    """
    anchors, valid = anchors_lib.every_anchor(batch.loss_mask, batch.documents)
    blocks = self.cut(batch, anchors, valid, self.drafter.max_drafts)
    mask, slots = blocks.mask, blocks.mask.shape[-1]
    ahead = functools.partial(jnp.roll, right[..., 0], axis=1)
    right = jnp.stack([ahead(-k) for k in range(slots)], axis=-1) & mask
    flat = mask.reshape(-1, slots)
    return right, dataclasses.replace(
      sums,
      supervised=flat.sum(axis=0, dtype=jnp.float32),
      blocks=flat.any(axis=-1).sum(dtype=jnp.float32),
      right=Right.of(right.reshape(-1, slots), flat),
      expected=None,
    )
