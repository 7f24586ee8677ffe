"""Replies: the same numbers as the record's, columns that come back whole."""

import dataclasses
import json

import numpy as np
import pytest

from eval import acceptance, bootstrap, records, replies, speed
from eval.replies import Replies
from tests.eval import reports


@pytest.fixture
def found():
  """Three replies to two prompts."""
  return Replies.of(reports.PROMPTS, reports.comparisons(different=(1,)))


def test_replies_are_placed_by_prompt_and_turn(found):
  assert found.prompt.tolist() == [0, 0, 1]
  assert found.turn.tolist() == [0, 1, 0]
  assert found.tokens.tolist() == [8, 6, 6]
  assert found.rounds.tolist() == [3, 2, 4]
  assert found.accepted.tolist() == [[1, 0, 2], [0, 1, 1], [3, 1, 0]]
  assert found.identical.tolist() == [True, False, True]
  assert found.prompts == 2
  with pytest.raises(ValueError, match="3 turns have 2 replies"):
    Replies.of(reports.PROMPTS, reports.comparisons()[:2])


def test_numbers_are_those_done_by_hand(found):
  once = bootstrap.once(3)
  hand = {
    # 7 tokens in 3 rounds, 5 in 2, 5 in 4: bonus tokens counted.
    "tau_per_request": (7 / 3 + 5 / 2 + 5 / 4) / 3,
    "tau_per_round": 17 / 9,
    # Speed-ups 2, 3 and 0.8: the median of ratios, not a ratio of means.
    "speedup": 2.0,
    "speculative_tokens_per_s": 50.0,
    "plain_tokens_per_s": 25.0,
  }
  for name, value in hand.items():
    assert replies.NUMBERS[name](found, once) == pytest.approx([value]), name
  shares = replies.acceptance_per_position(found, once)
  assert shares[0] == pytest.approx([5 / 9, 3 / 9])
  given = replies.conditional_acceptance(found, once)
  assert given[0] == pytest.approx([5 / 9, 3 / 5])


def test_numbers_are_those_of_the_record():
  rows = [*reports.THREE, ([], 0.0, 0.0)]  # a reply of one token
  prompts = [*reports.PROMPTS, reports.PROMPTS[1]]
  compared = reports.comparisons(rows)
  found = Replies.of(prompts, compared)
  whole = dataclasses.asdict(
    acceptance.summarize([each.speculative for each in compared])
  ) | dataclasses.asdict(speed.summarize(compared))
  for name, number in replies.NUMBERS.items():
    value = number(found, bootstrap.once(4))[0]
    assert value == pytest.approx(whole[name]), name


def test_intervals_draw_prompts_not_turns(found):
  intervals = replies.find_intervals(found)
  # Of the 4 draws of two prompts, the extremes are one of them twice.
  low, high = intervals["tau_per_request"]
  assert low == pytest.approx(5 / 4)
  assert high == pytest.approx((7 / 3 + 5 / 2) / 2)
  assert intervals["speedup"] == pytest.approx([0.8, 2.5])
  assert len(intervals["acceptance_per_position"]) == 2


def test_what_nothing_can_be_said_of_has_no_interval(found):
  alone = found.take(np.array([0, 1]))
  assert set(replies.find_intervals(alone)["acceptance_per_position"]) == {None}
  assert replies.find_intervals(alone)["speedup"] is None
  never = dataclasses.replace(found, accepted=np.array([[3, 0, 0]] * 3))
  given = replies.find_intervals(never)["conditional_acceptance"]
  assert given == [[0.0, 0.0], None]


def test_columns_come_back_through_json(found):
  again = Replies.from_json(json.loads(json.dumps(found.to_json())))
  for field in dataclasses.fields(Replies):
    ours, theirs = getattr(found, field.name), getattr(again, field.name)
    assert np.allclose(ours, theirs) and ours.dtype.kind == theirs.dtype.kind


@pytest.mark.parametrize(
  "change",
  [
    {"rounds": [1, 2]},
    {"accepted": [1, 2, 3]},
    {"accepted": [[1], [1, 2], [3]]},
    {"turn": None},
  ],
)
def test_damaged_columns_are_refused(found, change):
  with pytest.raises((KeyError, TypeError, ValueError)):
    Replies.from_json(found.to_json() | change)


def test_records_keep_lists_of_numbers_on_a_line():
  record = {
    "a": [1, 2.5, None],
    "b": [[1, 2], [3]],
    "c": ["x\n[\n 1,\n 2\n]", "y"],
    "d": [],
    "e": {"f": [True]},
  }
  text = records.to_json(record)
  assert json.loads(text) == record
  assert '"a": [1, 2.5, null]' in text and "[1, 2]" in text
  assert records.to_json(json.loads(text)) == text
  with pytest.raises(ValueError):
    records.to_json({"a": float("nan")})
