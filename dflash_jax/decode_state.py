"""What the decode loop carries: parameters, requests, what a pass read."""

import dataclasses
from typing import Any

import jax
import numpy as np

from dflash_jax.cache import KVCache, Rows
from dflash_jax.drafters.base import Borrowed
from dflash_jax.laws import Laws
from dflash_jax.target import Params
from dflash_jax.verify import Verdict
from dflash_jax.width import UNMEASURED, Costs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelParams:
  """Parameters of everything a round runs.

  Attributes:
    target, drafter: of the networks.
    borrowed: the target's tables.
    costs: measured on this device, for width policies that need them.
  """

  target: Params
  drafter: Params
  borrowed: Borrowed
  costs: Costs = UNMEASURED


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """Requests in flight, one per row.

  Attributes:
    cache: the target's; holds every token of the row but the anchor.
    drafter: the drafter's own state, as long as the cache.
    anchor: i32[B], last emitted token, not yet read by the target.
    tokens: i32[B, M], the reply so far.
    slots: i32[B, M], the block slot each token was drafted in, 1..K-1; 0 marks
      a token of the target's own: correction, bonus, or plain.
    count: i32[B], valid entries of `tokens`.
    budget: i32[B], most tokens a reply may have.
    done: bool[B], budget spent or stop token emitted.
    seeds: u32[B], one noise stream per request.
    rounds: i32[B], target passes after prefill.
    accepted: i32[B, D + 1], rounds by number of drafts accepted.
    verified: i32[B], nodes verified in all rounds.
    width: the width policy's own state, shared by the rows.
    drafts: bool[], whether the policy wants the next rounds drafted.
    laws: of each row; None for the decoder's own sampling.
    stops: i32[B, W], tokens that end each reply, -1 where fewer; None for the
      decoder's own stop_ids.
  """

  cache: KVCache
  drafter: Any
  anchor: jax.Array
  tokens: jax.Array
  slots: jax.Array
  count: jax.Array
  budget: jax.Array
  done: jax.Array
  seeds: jax.Array
  rounds: jax.Array
  accepted: jax.Array
  verified: jax.Array
  width: Any
  drafts: jax.Array
  laws: Laws | None = None
  stops: jax.Array | np.ndarray | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Read:
  """What a target pass made of a proposal, along the accepted path.

  Attributes:
    rows: of the target's cache, D + 1 of them.
    taps: f32[B, D + 1, taps * D]. tokens: i32[B, D + 1], as read.
    verdict: tokens i32[B, D + 1] to emit, and how many were accepted.
    emitted: i32[B], of them, within budget and up to a stop token.
    width: i32[], nodes verified.
  """

  rows: Rows
  taps: jax.Array
  tokens: jax.Array
  verdict: Verdict
  emitted: jax.Array
  width: jax.Array
