"""What the target makes of a proposal."""

import dataclasses

import jax
import jax.numpy as jnp

from dflash_jax.proposal import Proposal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
  """The tokens a round yields.

  Attributes:
    tokens: i32[B, P + 1]; the first accepted + 1 are the target's own choices.
    accepted: i32[B], drafts accepted, 0..P.
  """

  tokens: jax.Array
  accepted: jax.Array


def match_prefix(proposal: Proposal, chosen: jax.Array) -> Verdict:
  """Accepts drafts for as long as they equal what the target chooses.

  Every emitted token is the target's own choice given the tokens before it, so
  the output is plain decoding's for any drafter (inference.md 4.1; with seeded
  noise in the choice, 4.5 with one-hot proposals).

  Args:
    proposal: P drafts per row.
    chosen: i32[B, P + 1], the target's token after the anchor and each draft.
  """
  matches = (proposal.tokens == chosen[:, :-1]).astype(jnp.int32)
  return Verdict(
    tokens=chosen, accepted=jnp.cumprod(matches, axis=1).sum(axis=1)
  )
