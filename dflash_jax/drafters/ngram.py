"""N-gram look-up: what followed the last time the text said the same.

No network and no parameters: drafts are copied from the row's own history,
prompt included. The longest suffix that occurred before decides, of several
occurrences the latest.
Source: prompt look-up decoding (Saxena 2023, github.com/apoorvumang/
prompt-lookup-decoding), with a copy that may overlap itself as in LZ77.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from dflash_jax.cache import Pages
from dflash_jax.config import ConfigError
from dflash_jax.drafters.base import Borrowed, Params
from dflash_jax.proposal import Drafting, Moment, Proposal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
  """Committed tokens i32[B, S], and how many: length i32[B]."""

  tokens: jax.Array
  length: jax.Array


@dataclasses.dataclass(frozen=True)
class NGram:
  """Look-up of suffixes of max_match tokens, or fewer, down to min_match.

  Its proposals are certain chains, whatever is asked: every rule takes them.
  """

  max_drafts: int
  max_match: int = 4
  min_match: int = 1

  taps: ClassVar[tuple[int, ...]] = ()
  reads_drafts: ClassVar[bool] = False
  rereads: ClassVar[int] = 0

  def __post_init__(self):
    if not 1 <= self.min_match <= self.max_match:
      raise ConfigError(
        f"min_match={self.min_match} and max_match={self.max_match} are "
        "impossible; use 1 <= min_match <= max_match"
      )

  def init_state(self, batch: int, capacity: int, dtype: str) -> History:
    """Nothing read yet."""
    del dtype
    return History(
      tokens=jnp.zeros((batch, capacity), jnp.int32),
      length=jnp.zeros((batch,), jnp.int32),
    )

  def absorb(
    self,
    params: Params,
    state: History,
    taps: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
  ) -> History:
    """Appends the first `count` tokens; those past it lie void."""
    del params, taps

    def append(text, new, start):
      return jax.lax.dynamic_update_slice(text, new, (start,))

    text = jax.vmap(append)(state.tokens, tokens, state.length)
    return History(text, state.length + count)

  def reopen(self, state: History, length: jax.Array) -> History:
    """Rows that hold length i32[B] tokens."""
    return dataclasses.replace(state, length=length)

  def cut(
    self, state: History, row: jax.Array, start: jax.Array, shape: Pages
  ) -> jax.Array:
    """Tokens of a row, i32[count, size]."""
    size = (1, shape.count * shape.size)
    tokens = jax.lax.dynamic_slice(state.tokens, (row, start), size)
    return tokens.reshape(shape.count, shape.size)

  def paste(
    self, state: History, row: jax.Array, start: jax.Array, pages: jax.Array
  ) -> History:
    """Writes them into a row."""
    tokens = jax.lax.dynamic_update_slice(
      state.tokens, pages.reshape(1, -1), (row, start)
    )
    return dataclasses.replace(state, tokens=tokens)

  def propose(
    self,
    params: Params,
    state: History,
    anchor: jax.Array,
    borrowed: Borrowed,
    drafting: Drafting,
    moment: Moment,
    remaining: jax.Array,
  ) -> Proposal:
    """Copies what followed the latest of the longest earlier matches.

    A copy that reaches the anchor goes on with what it has copied, as if the
    text repeated itself from the match on. Without a match the anchor is
    offered again, at confidence 0.

    A match of m tokens is believed with m / (m + 1), the rule of succession
    after m right tokens in a row; each draft lengthens it by one.
    """
    del params, borrowed, moment, remaining
    place = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)
    is_anchor = place == state.length[:, None]
    text = jnp.where(is_anchor, anchor[:, None], state.tokens)
    match = self._match_lengths(text, state.length)
    longest = match.max(axis=1, keepdims=True)
    latest = jnp.where(match == longest, place, 0).max(axis=1, keepdims=True)

    P = min(drafting.num_nodes, self.max_drafts)
    ahead = jnp.arange(P, dtype=jnp.int32)
    distance = jnp.maximum(state.length[:, None] - latest, 1)
    copied = jnp.take_along_axis(text, latest + 1 + ahead % distance, axis=1)
    found = longest > 0
    trusted = (longest + ahead).astype(jnp.float32)
    return Proposal(
      tokens=jnp.where(found, copied, anchor[:, None]),
      confidence=jnp.where(found, trusted / (trusted + 1), 0.0),
      margins=jnp.where(found, jnp.log(trusted), -jnp.inf),
    )

  def _match_lengths(self, text: jax.Array, anchor: jax.Array) -> jax.Array:
    """i32[B, S]: tokens up to each place that are also the last of the text.

    At most max_match; 0 where there are fewer than min_match, and from the
    anchor on.

    Args:
      text: i32[B, S], the anchor in its place.
      anchor: i32[B], its place.
    """
    B, S = text.shape
    matches = jnp.broadcast_to(jnp.arange(S) < anchor[:, None], (B, S))
    length = jnp.zeros((B, S), jnp.int32)
    for back in range(self.max_match):
      last = jnp.maximum(anchor - back, 0)[:, None]
      wanted = jnp.take_along_axis(text, last, axis=1)
      shifted = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)[:, :S]
      matches &= shifted == wanted
      length += matches
    return jnp.where(length < self.min_match, 0, length)
