"""What a drafter offers the target in one round."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Proposal:
  """A chain of drafts that continue the anchor.

  Attributes:
    tokens: i32[B, P]; tokens[:, i] is the draft i + 1 positions past the
      anchor. P = 0 proposes nothing, and the round is plain decoding.
  """

  tokens: jax.Array
