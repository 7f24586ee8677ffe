"""How EAGLE-3 learns: by doing in training what it will do in drafting.

Step 0 reads the text with the target's states and runs once over whole rows;
chains then leave it at the anchors and feed on the layer's own output, with the
answer's tokens (training-time test). Step k's cost is the cross-entropy of the
target's law over the draft vocabulary, as `kl` has it up to a constant, and
counts 0.8^k: "decay" with its default. Where the published trainers begin a
chain at every position, this one draws anchors as all others do; as many
train.num_anchors as the longest answer has places begin them everywhere.
Source: EAGLE-3, arXiv 2503.01840, section 3.2; weights, seven steps and the
mask of labels outside the draft vocabulary from package specforge 0.2.0.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dflash_jax.cache import Rows
from dflash_jax.drafters import Borrowed, Eagle3
from dflash_jax.drafters.nodes import gather
from dflash_jax.target import Params
from train.anchors import Blocks, document_starts
from train.drafts import Drafts
from train.learners.base import Learner, see_text
from train.objective import Objective
from train.state import Batch

STEP_SHARE = 0.8  # of a step's weight that the next one has

Text = tuple[jax.Array, Rows]  # step 0: outputs, and keys and values


@dataclasses.dataclass(frozen=True)
class Eagle3Learner(Learner):
  """The training-time test."""

  drafter: Eagle3

  @property
  def objective(self) -> Objective:
    """What the settings minimise; weights decay as published unless told."""
    objective = super().objective
    decay = objective.decay or -1 / math.log(STEP_SHARE)
    return dataclasses.replace(objective, decay=decay)

  @property
  def slots(self) -> int:
    """Steps of the unrolled layer."""
    return min(self.config.unroll_steps, self.drafter.max_drafts)

  def bind(self, params: Params, borrowed: Borrowed) -> Params:
    """What decoding reads: with the embedding, and the head's ids."""
    return self.drafter.bind(params, borrowed)

  def cut(
    self, batch: Batch, anchors: jax.Array, valid: jax.Array, slots: int
  ) -> Blocks:
    """Blocks; a document's first token has no state before it to pair with."""
    starts = document_starts(batch.documents)
    valid &= anchors > jnp.take_along_axis(starts, anchors, axis=1)
    return super().cut(batch, anchors, valid, slots)

  def read(
    self, params: Params, borrowed: Borrowed, taps: jax.Array, batch: Batch
  ) -> Text:
    """Step 0 of all rows: pairs of tokens and the target's states."""
    B, S = batch.tokens.shape
    starts = document_starts(batch.documents)
    places = jnp.broadcast_to(jnp.arange(S), (B, S))
    return self.drafter.begin_chains(
      self.bind(params, borrowed),
      batch.tokens,
      taps,
      places - starts,
      see_text(places, starts, S),
    )

  def run(
    self, params: Params, borrowed: Borrowed, context: Text, blocks: Blocks
  ) -> jax.Array:
    """f32[B, A, K', D]: outputs of the chain that begins at each anchor.

    The anchor pairs with the state of the row before it.
    """
    hidden, text = context
    rows = jnp.maximum(blocks.anchors - 1, 0)
    outputs = self.drafter.continue_chains(
      self.bind(params, borrowed),
      (gather(hidden, rows), text),
      blocks.previous,
      rows - blocks.starts,
      see_text(rows, blocks.starts, hidden.shape[1]),
    )
    return jnp.stack(outputs, axis=2)

  def say(
    self,
    params: Params,
    borrowed: Borrowed,
    hidden: jax.Array,
    previous: jax.Array,
    columns: jax.Array,
  ) -> Drafts:
    """The logits of its own head."""
    del borrowed, previous, columns
    logits = self.drafter.logits(params, hidden)
    return Drafts(logits, corrected=None, choice=None, odds=None)
