"""What the target makes of a proposal: the rules of verification.

| rule    | drafts it takes      | what it guarantees                          |
|---------|----------------------|---------------------------------------------|
| greedy  | certain              | plain greedy decoding's tokens              |
| coupled | certain              | the tokens of plain sampling with that seed |
| token   | certain, drawn; tree | the target's law                            |
| block   | certain, drawn       | the target's law, most tokens per round     |
| typical | certain chains       | nothing: lossy, Medusa's typical acceptance |

Certain drafts leave token and block nothing to gain over coupled, whose law
they share then, so coupled is what runs for them.
docs/verification.md has the mathematics.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dflash_jax import noise, rejection, tree
from dflash_jax.config import ConfigError
from dflash_jax.laws import Laws
from dflash_jax.noise import Stream
from dflash_jax.prediction import Prediction
from dflash_jax.proposal import Drafting, Law, Moment, Proposal
from dflash_jax.sampling import Sampling, argmax, weigh
from pallas_kernels.block_verify import Streams, block_verify
from pallas_kernels.block_verify.rule import count_leading, find_last

RULES = ("greedy", "coupled", "token", "block", "typical")
# What a reader may expect of the output, against plain decoding.
GUARANTEES = {
  "tokens": "the tokens of plain decoding with the same seed",
  "law": "the law of plain decoding, other tokens",
  "none": "LOSSY: neither the tokens nor the law of plain decoding",
}
STREAMS = Streams(Stream.ACCEPT, Stream.RECOVERY, Stream.BONUS)
TYPICAL_FLOOR, TYPICAL_SCALE = 0.09, 0.3  # Medusa's defaults, arXiv 2401.10774


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Verdict:
  """The tokens a round yields.

  Attributes:
    tokens: i32[B, D + 1]; the first accepted + 1 are the round's.
    accepted: i32[B], drafts accepted, 0..D.
    path: i32[B, D + 1], the row of [anchor, nodes] at each depth, for trees;
      past `accepted` it repeats the last. None for chains, which stay in order.
  """

  tokens: jax.Array
  accepted: jax.Array
  path: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Verifier:
  """A rule and the law it keeps; static in jitted code.

  Attributes:
    rule: one of RULES.
    sampling: the target's law.
    max_depth: the most drafts a round can accept.
  """

  rule: str
  sampling: Sampling
  max_depth: int

  def guarantee(self, drafting: Drafting) -> str:
    """Key of GUARANTEES: what the output shares with plain decoding's."""
    if self.rule == "typical":
      return "none"
    if self.sampling.is_greedy or drafting.is_certain:
      return "tokens"
    return "law"

  def check(self, drafting: Drafting) -> None:
    """Raises ConfigError for a pairing that would not do what it says."""
    if self.rule not in RULES:
      raise ConfigError(
        f"rule={self.rule!r} is unknown; choose one of {', '.join(RULES)}"
      )
    if self.rule == "greedy" and not self.sampling.is_greedy:
      raise ConfigError(
        f"rule='greedy' at temperature={self.sampling.temperature} would not "
        "sample; use rule='coupled', 'token' or 'block'"
      )
    if self.rule in ("greedy", "typical") and not drafting.is_certain:
      raise ConfigError(
        f"rule={self.rule!r} cannot weigh drawn drafts; set draft_temperature=0"
      )
    if self.rule == "block" and drafting.is_tree and not drafting.is_certain:
      raise ConfigError(
        "rule='block' has no lossless form for trees of drawn drafts; use "
        "rule='token' or tree_nodes=0"
      )
    if self.rule == "typical" and drafting.is_tree:
      raise ConfigError("rule='typical' takes chains only; set tree_nodes=0")

  def judge(
    self,
    proposal: Proposal,
    prediction: Prediction,
    moment: Moment,
    laws: Laws | None = None,
  ) -> Verdict:
    """Applies the rule.

    Args:
      proposal: P nodes per row.
      prediction: the target's, after the anchor and each of P nodes.
      moment: addresses of noise.
      laws: the target's by row, instead of the rule's own; for certain drafts
        and the coupled rule, which is greedy's where a row is greedy.
    """
    if self.rule == "typical":
      return self._accept_typical(proposal, prediction, moment)
    if proposal.law is None or not proposal.num_nodes:
      law = self.sampling if laws is None else laws
      return self._match(proposal, prediction, moment, law)
    logits = prediction.logits()
    if proposal.tree is not None:
      return self._accept_siblings(
        proposal.tokens, proposal.tree, proposal.law, self._law(logits), moment
      )
    knows_all = proposal.law.ids is None
    accept = self._accept_drawn if knows_all else self._accept_trimmed
    accepted, last = accept(proposal.tokens, proposal.law, logits, moment)
    return Verdict(_replace(proposal.tokens, accepted, last), accepted)

  def _law(self, logits: jax.Array) -> jax.Array:
    """f32[B, T, V]: the target's probabilities."""
    weights = weigh(logits, self.sampling)
    return weights / weights.sum(axis=-1, keepdims=True)

  def _match(
    self,
    proposal: Proposal,
    prediction: Prediction,
    moment: Moment,
    law: Sampling | Laws,
  ) -> Verdict:
    """Accepts drafts for as long as they equal what the target chooses.

    Every emitted token is the target's own choice given the tokens before it,
    with noise that depends on its position alone: plain decoding's tokens, for
    any drafter (Daliri et al., arXiv 2408.07978).
    """
    after = jnp.arange(proposal.num_nodes + 1, dtype=jnp.int32)
    positions = moment.positions[:, None] + 1 + after
    if proposal.tree is None:
      chosen = prediction.choose(law, moment.seeds, positions)
      return match_prefix(proposal, chosen)
    depth = min(self.max_depth, proposal.num_nodes)
    positions = positions[:, : depth + 1]
    depths = jnp.pad(proposal.tree.depths, ((0, 0), (1, 0)))
    chosen = prediction.choose(law, moment.seeds, positions, depths)
    path, accepted = tree.descend(proposal.tree, proposal.tokens, chosen, depth)
    tokens = jnp.take_along_axis(chosen, path, axis=1)
    return Verdict(tokens, accepted, path)

  def _accept_drawn(
    self, drafts: jax.Array, law: Law, logits: jax.Array, moment: Moment
  ) -> tuple[jax.Array, jax.Array]:
    """The token or the block rule, of drafters that know every token.

    Returns:
      accepted i32[B] and last i32[B], the token that ends the round.
    """
    is_plain = not (self.sampling.is_greedy or self.sampling.is_restricted)
    return block_verify(
      logits if is_plain else self._law(logits),
      law.probs[:, : drafts.shape[1]],
      drafts,
      moment.seeds,
      moment.positions,
      rule=self.rule,
      temperature=self.sampling.temperature if is_plain else None,
      draft_temperature=None,
      streams=STREAMS,
    )

  def _accept_trimmed(
    self, drafts: jax.Array, law: Law, logits: jax.Array, moment: Moment
  ) -> tuple[jax.Array, jax.Array]:
    """The same, of drafters that know some tokens only."""
    probs = self._law(logits)
    draws = noise.uniform(
      Stream.ACCEPT, moment.seeds, moment.positions, drafts.shape[1]
    )
    if self.rule == "token":
      odds = rejection.token_odds(probs, drafts, law)
      accepted = count_leading(draws <= odds)
      scale = jnp.ones_like(odds[:, 0])
    else:
      odds, weights = rejection.block_odds(probs, drafts, law)
      accepted = find_last(draws <= odds)
      scale = jnp.take_along_axis(weights, accepted[:, None], axis=1)[:, 0]
    row = jnp.take_along_axis(probs, accepted[:, None, None], axis=1)[:, 0]
    rejected = accepted < drafts.shape[1]
    depth = jnp.where(rejected, accepted, law.probs.shape[1])
    weights = rejection.residual(row, scale, law, depth)
    return accepted, _draw_last(weights, rejected, moment)

  def _accept_siblings(
    self,
    drafts: jax.Array,
    nodes: tree.Tree,
    law: Law,
    probs: jax.Array,
    moment: Moment,
  ) -> Verdict:
    """The token rule over a tree."""
    draws = noise.uniform(
      Stream.ACCEPT, moment.seeds, moment.positions, drafts.shape[1]
    )
    depth = min(self.max_depth, drafts.shape[1])
    path, accepted, weights, _ = rejection.accept_siblings(
      probs, nodes, law, draws, depth
    )
    has_child = (nodes.parents == path[:, -1:]).any(axis=1)
    last = _draw_last(weights, has_child, moment)
    rows = jnp.pad(drafts, ((0, 0), (1, 0)))
    tokens = jnp.take_along_axis(rows, path[:, 1:], axis=1)
    return Verdict(_replace(tokens, accepted, last), accepted, path)

  def _accept_typical(
    self, proposal: Proposal, prediction: Prediction, moment: Moment
  ) -> Verdict:
    """Keeps drafts that are likely enough where the target is unsure. Lossy.

    p(x) > min(floor, scale exp(-entropy)): Medusa, arXiv 2401.10774, section
    3.3.1. The round's last token is the target's own choice.
    """
    probs = self._law(prediction.logits())
    P = proposal.num_nodes
    entropy = jax.scipy.special.entr(probs[:, :P]).sum(axis=-1)
    limit = jnp.minimum(TYPICAL_FLOOR, TYPICAL_SCALE * jnp.exp(-entropy))
    likely = jnp.take_along_axis(
      probs[:, :P], proposal.tokens[..., None], axis=-1
    )[..., 0]
    accepted = count_leading(likely > limit)
    rows = jnp.arange(P + 1, dtype=jnp.int32)
    positions = moment.positions[:, None] + 1 + rows
    chosen = prediction.choose(self.sampling, moment.seeds, positions)
    last = jnp.take_along_axis(chosen, accepted[:, None], axis=1)[:, 0]
    return Verdict(_replace(proposal.tokens, accepted, last), accepted)


def match_prefix(proposal: Proposal, chosen: jax.Array) -> Verdict:
  """The leading drafts that equal what the target chooses.

  Args:
    proposal: a chain of P drafts per row.
    chosen: i32[B, P + 1], the target's token after the anchor and each draft.
  """
  accepted = count_leading(proposal.tokens == chosen[:, :-1])
  return Verdict(tokens=chosen, accepted=accepted)


def _draw_last(
  weights: jax.Array, is_recovery: jax.Array, moment: Moment
) -> jax.Array:
  """i32[B], a token of f32[B, V]: in place of a rejected draft, or a bonus."""
  stream = jnp.where(is_recovery, Stream.RECOVERY, Stream.BONUS)
  times = noise.race_times(
    stream, moment.seeds, moment.positions, weights.shape[-1]
  )
  return argmax(weights / times)


def _replace(
  tokens: jax.Array, accepted: jax.Array, last: jax.Array
) -> jax.Array:
  """i32[B, D + 1]: drafts i32[B, D], with `last` after the accepted ones."""
  padded = jnp.pad(tokens, ((0, 0), (0, 1)))
  places = jnp.arange(padded.shape[1])
  return jnp.where(places == accepted[:, None], last[:, None], padded)
