"""A small language model as the drafter: speculative decoding as it began.

It reads tokens alone, nothing of the target, so any decoder-only model of the
target's vocabulary will do: an off-the-shelf one of the target's own family, or
one distilled from the target.
Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from dflash_jax.autoregression import draft
from dflash_jax.cache import KVCache, Pages, Rows
from dflash_jax.config import ConfigError, TargetConfig
from dflash_jax.drafters.base import Borrowed, Params
from dflash_jax.drafters.nodes import Nodes
from dflash_jax.proposal import Drafting, Moment, Proposal
from dflash_jax.target import Target


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A small model's formulas, bound to one architecture.

  Attributes:
    config: of the small model.
    max_drafts: passes a proposal may take, one per depth.
    borrows: whether it uses the target's embedding and head, which `bind` then
      puts beside its own parameters.
  """

  config: TargetConfig
  max_drafts: int
  borrows: bool = False

  taps: ClassVar[tuple[int, ...]] = ()
  reads_drafts: ClassVar[bool] = True
  rereads: ClassVar[int] = 0

  @property
  def network(self) -> Target:
    """What runs: nothing tells a small target from a large one."""
    return Target(self.config)

  def check_target(self, target: TargetConfig) -> None:
    """Raises ConfigError, naming both numbers, if `target` does not fit."""
    pairs = {"vocabulary": (self.config.vocab_size, target.vocab_size)}
    if self.borrows:
      pairs["width (it borrows the target's embedding and head)"] = (
        self.config.width,
        target.width,
      )
    shortest = min(filter(None, self.config.layer_windows), default=None)
    if shortest is not None and shortest < self.max_drafts:
      raise ConfigError(
        f"the draft model's window of {shortest} tokens is shorter than "
        f"{self.max_drafts} drafts; draft at most {shortest} tokens: set "
        "drafter.block_size"
      )
    for what, (ours, theirs) in pairs.items():
      if ours != theirs:
        raise ConfigError(
          f"draft model and target do not match: {what} is {ours} in the "
          f"draft model and {theirs} in the target; use a model of the "
          "target's family"
        )

  def init(
    self, key: jax.Array, dtype: str = "float32", columns: int | None = None
  ) -> Params:
    """Random parameters, its own alone: N(0, 0.02) matrices and unit norms.

    Args:
      key: of the draw.
      dtype: of all parameters.
      columns: None; its head keeps all tokens.

    Raises:
      ConfigError: for a trimmed head.
    """
    if columns not in (None, self.config.vocab_size):
      raise ConfigError(
        f"a small language model's head has all of its "
        f"{self.config.vocab_size} columns, not {columns}; set "
        "drafter.draft_vocabulary=0"
      )
    params = self.network.init(key, dtype)
    if self.borrows or self.config.tied_head:
      del params["head"]
    if self.borrows:
      del params["embedding"]
    return params

  def count_parameters(self) -> int:
    """Trained numbers, counted without allocating any."""
    tree = jax.eval_shape(self.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(tree))

  def bind(self, params: Params, borrowed: Borrowed | None = None) -> Params:
    """All that drafting reads: its parameters, and the tables they lack.

    Args:
      params: as `init` or weights.load_target gives them.
      borrowed: the whole tables of the target, no head trimmed; not asked for
        unless it borrows.
    """
    if self.borrows:
      assert borrowed is not None
      head = {"kernel": borrowed.head}
      return {**params, "embedding": borrowed.embedding, "head": head}
    if self.config.tied_head and "head" not in params:
      return {**params, "head": {"kernel": params["embedding"].T}}
    return params

  def init_state(self, batch: int, capacity: int, dtype: str) -> KVCache:
    """Keys and values of committed tokens: none yet."""
    return self.network.init_cache(batch, capacity, dtype)

  def absorb(
    self,
    params: Params,
    state: KVCache,
    taps: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
  ) -> KVCache:
    """Reads the tokens that the target has just read.

    Drafts among them are read a second time, and the last of them, which no
    draft continued, for the first.
    """
    del taps
    _, _, rows = self.network.forward(params, tokens, state)
    return state.extend(rows, count)

  def reopen(self, state: KVCache, length: jax.Array) -> KVCache:
    """Rows that hold length i32[B] tokens."""
    return state.reopen(length)

  def cut(
    self, state: KVCache, row: jax.Array, start: jax.Array, shape: Pages
  ) -> Rows:
    """Keys and values of a row's tokens, in pages."""
    return state.cut(row, start, shape)

  def paste(
    self, state: KVCache, row: jax.Array, start: jax.Array, pages: Rows
  ) -> KVCache:
    """Writes them into a row."""
    return state.paste(row, start, pages)

  def propose(
    self,
    params: Params,
    state: KVCache,
    anchor: jax.Array,
    borrowed: Borrowed,
    drafting: Drafting,
    moment: Moment,
    remaining: jax.Array,
  ) -> Proposal:
    """Drafts depth by depth, one pass each."""
    del borrowed, remaining
    return draft(
      functools.partial(self._step, params, state),
      Nodes.before(state),
      anchor,
      None,
      drafting,
      moment,
      self.config.vocab_size,
      self.max_drafts,
    )

  def _step(
    self,
    params: Params,
    cache: KVCache,
    nodes: Nodes,
    tokens: jax.Array,
    parents: jax.Array,
    depth: int,
  ) -> tuple[Nodes, jax.Array]:
    """The logits after each of tokens i32[B, W], all at one depth."""
    seen = nodes.below(parents)
    positions = cache.length[:, None] + jnp.full_like(tokens, depth)

    def attend(layer, query, key, value, sinks):
      window = self.config.window(layer)
      oldest = None if window is None else cache.own_length + depth + 1 - window
      return nodes.attend(cache, seen, layer, query, key, value, sinks, oldest)

    hidden, _, rows = self.network.run(
      params, tokens, positions, attend, cache.dtype
    )
    return nodes.add(rows, seen), self.network.logits(params, hidden)
