"""What a drafter must be, so that one decode loop serves them all."""

import dataclasses
from typing import Any, Protocol

import jax

from dflash_jax.cache import Pages
from dflash_jax.proposal import Drafting, Moment, Proposal

Params = dict[str, Any]
State = Any  # a pytree of the drafter's own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Borrowed:
  """The target's tables a drafter may use: arguments, frozen, never its own.

  Attributes:
    embedding: f[V, D].
    head: f[D, V'], columns of the target's head.
    head_ids: i32[V'], token id of each column, or None when V' = V and columns
      are ids. A trimmed head is cheaper and narrows only what can be proposed.
  """

  embedding: jax.Array
  head: jax.Array
  head_ids: jax.Array | None


class Drafter(Protocol):
  """Static configuration with pure functions of (params, state, ...).

  A drafter is hashable, so it can be a static argument of a jitted function.

  What it made of tokens start..start + T of a text depends on the text up to
  there alone. So it can be cut out of one row, in pages, kept, and pasted into
  another row whose text begins with the same tokens; see serving/pages.py.
  """

  @property
  def taps(self) -> tuple[int, ...]:
    """The target layers whose output it reads, 0-based."""

  @property
  def max_drafts(self) -> int:
    """The most drafts one proposal can hold."""

  @property
  def reads_drafts(self) -> bool:
    """Whether a draft's law depends on the drafts before it in its round.

    Then a sampled draft shapes what is known of later ones, and some pairings
    with rules and widths would not be lossless; see decode.check_pairing.
    """

  @property
  def rereads(self) -> int:
    """Pasted tokens, at the end, that a row has to absorb once more."""

  def init_state(self, batch: int, capacity: int, dtype: str) -> State:
    """State before any token: `capacity` bounds the tokens of a row.

    Its leaves begin with the batch axis.
    """

  def absorb(
    self,
    params: Params,
    state: State,
    taps: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
  ) -> State:
    """Takes in what the target just read.

    Args:
      params: the drafter's own parameters.
      state: before these tokens.
      taps: f32[B, T, taps * D], the target's states at `tokens`.
      tokens: i32[B, T].
      count: i32[B]; only the first count tokens of a row are committed.
    """

  def propose(
    self,
    params: Params,
    state: State,
    anchor: jax.Array,
    borrowed: Borrowed,
    drafting: Drafting,
    moment: Moment,
    remaining: jax.Array,
  ) -> Proposal:
    """Drafts what follows the anchor.

    Args:
      params: the drafter's own parameters.
      state: has absorbed every token before the anchor.
      anchor: i32[B], the last emitted token.
      borrowed: the target's tables.
      drafting: how many nodes, chain or tree, certain or drawn. A drafter that
        only knows certain chains offers those, whatever is asked: every rule
        takes them.
      moment: addresses of noise, and the anchor's position.
      remaining: i32[B], tokens the reply may still take; drafts past them are
        never used.
    """

  def reopen(self, state: State, length: jax.Array) -> State:
    """Rows as if they had just absorbed length i32[B] tokens.

    What was made of them stands in the state or will be pasted, and of the
    next `rereads` tokens too; all else is void.
    """

  def cut(
    self, state: State, row: jax.Array, start: jax.Array, shape: Pages
  ) -> State:
    """What the state of row i32[] has of tokens from start i32[] on.

    Returns:
      A pytree whose leaves begin with an axis of shape.count pages, of
      shape.size tokens each. `start` is a multiple of their product.
    """

  def paste(
    self, state: State, row: jax.Array, start: jax.Array, pages: State
  ) -> State:
    """Writes what `cut` took, of the same tokens, into row i32[]."""
