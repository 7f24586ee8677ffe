"""Whatever the mix: a request's answer is its own, and nothing is left over."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.drafters import LanguageModel
from dflash_jax.engine import Engine
from dflash_jax.serving import lane as lane_lib
from dflash_jax.serving.prefixes import Prefixes
from tests.serving.schedules import (
  CONFIG,
  check_mixed,
  lanes,
  near_model,
  random_requests,
  run,
)


def test_a_hundred_requests_do_not_notice_each_other():
  engine = check_mixed(near_model(), seed=1, count=100)
  counters = engine.counters
  assert counters.requests == 100
  assert 0.1 < counters.hit_rate < 0.9  # shared, and evicted
  assert counters.prompt_tokens >= counters.hit_tokens + counters.read_tokens


@pytest.mark.slow
def test_a_trunk_goes_unnoticed_too():
  config = dataclasses.replace(CONFIG, trunk=64)
  check_mixed(near_model(), seed=4, count=200, config=config)


@pytest.mark.slow
def test_two_thousand_requests_do_not_notice_each_other():
  check_mixed(near_model(), seed=2, count=2000)


@pytest.mark.slow
def test_the_schedule_shows_what_it_should():
  """Every phase is cancelled, every reason to end occurs, drafts are right."""
  rng = random.Random(1)
  requests = random_requests(rng, 100)
  engine = Engine(lanes(near_model()), CONFIG)
  results = run(engine, rng, requests)
  finishes = [result.finish for result in results]
  assert {"budget", "stop", "cancelled"} == {*finishes}
  dropped = [r for r in results if r.finish == "cancelled"]
  assert any(r.tokens for r in dropped) and any(not r.tokens for r in dropped)
  accepted = sum(np.array(r.accepted) for r in results if len(r.accepted) == 4)
  assert 0.2 < accepted[1:].sum() / accepted.sum() < 0.98
  evicted = sum(r.hit_tokens for r in results)
  assert evicted < sum(r.prompt_tokens for r in results) / 2


# --- Planted bugs -------------------------------------------------------------


class KeepsItsState(LanguageModel):
  """A new row goes on in the drafter's state of the row before."""

  def reopen(self, state, length):
    return state


class LosesContext(LanguageModel):
  """Shared pages restore the target's part alone."""

  def paste(self, state, row, start, pages):
    return state


class ShiftsContext(LanguageModel):
  """The drafter's part of a page is one token late."""

  def paste(self, state, row, start, pages):
    return state.paste(row, start, pages.roll(jnp.int32(1)))


def seeds_by_place(monkeypatch):
  """Noise keyed by the row, not by the request."""
  seat = lane_lib.rows.seat

  def wrong(batch, arrival, place, member):
    seeds = np.array([place], np.uint32)
    arrival = dataclasses.replace(arrival, seeds=seeds)
    return seat(batch, arrival, place, member)

  monkeypatch.setattr(lane_lib.rows, "seat", wrong)


def rows_that_stay(monkeypatch):
  """A cancelled request's row goes on decoding."""
  leave = lane_lib.Lane.leave_seat

  def wrong(self, place):
    batch = self._batch
    leave(self, place)
    self._batch = batch

  monkeypatch.setattr(lane_lib.Lane, "leave_seat", wrong)


def pages_freed_in_use(monkeypatch):
  """A page's number is given away while a row is yet to copy it."""
  find = Prefixes.find

  def wrong(self, tokens):
    path = find(self, tokens)
    for page in reversed(path):
      page.users -= 1
      if not page.users:
        self._idle[page] = None
    return path

  monkeypatch.setattr(Prefixes, "find", wrong)


def laws_of_others(monkeypatch):
  """Rows keep the laws of those who sat there before."""
  tell = lane_lib.Lane._tell

  def wrong(self, state, jobs):
    told = tell(self, state, jobs)
    laws = jax.tree.map(lambda x: np.roll(x, 1), told.laws)
    return dataclasses.replace(told, laws=laws)

  monkeypatch.setattr(lane_lib.Lane, "_tell", wrong)


def pages_of_another_text(monkeypatch):
  """Continuations are found by their own tokens, whatever came before."""
  hold = {}

  def wrong(self, tokens, place):
    key = tuple(tokens[place * self.size : (place + 1) * self.size])
    return hold.setdefault(key[:1], key) if len(key) == self.size else key

  monkeypatch.setattr(Prefixes, "_tokens_of", wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
  "bug",
  [
    KeepsItsState,
    LosesContext,
    ShiftsContext,
    seeds_by_place,
    rows_that_stay,
    pages_freed_in_use,
    laws_of_others,
    pages_of_another_text,
  ],
)
def test_planted_bugs_are_seen(bug, monkeypatch):
  kind = bug if isinstance(bug, type) else LanguageModel
  if kind is LanguageModel:
    bug(monkeypatch)
  with pytest.raises((AssertionError, RuntimeError, KeyError)):
    check_mixed(near_model(kind), seed=3, count=40)
