"""Round times and memory: every part, of every kind of decoding."""

import dataclasses

import pytest

from eval import round_time
from eval.round_time import Sizes
from tests.testing import tiny_model

SIZES = Sizes(batch=2, capacity=90, max_new_tokens=7)


@pytest.fixture(scope="module")
def splits():
  """Of a drafter and of plain decoding, few passes of each."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(round_time, "PASSES", 3)
    model = tiny_model(rounds_per_dispatch=3, width="goodput")
    return [
      round_time.split_round(each, SIZES)
      for each in (model, model.without_drafter())
    ]


def test_every_part_takes_time(splits):
  for found in splits:
    for part in ("draft_ms", "verify_ms", "commit_ms", "host_ms"):
      assert found[part] > 0
    assert found["whole_ms"] > 0 and found["parts_over_whole"] > 0
    assert found["rounds_per_dispatch"] == 3
    assert (found["batch"], found["capacity"]) == (2, 90)
  # An adaptive width is measured at the most that it may verify.
  assert [found["width"] for found in splits] == [4, 0]


def test_parts_are_those_of_the_round(monkeypatch):
  """A slow part, planted, is found where it is."""
  clock = iter([0, 1, 11, 111, 1000, 1002, 1032, 1332])
  monkeypatch.setattr(round_time.time, "perf_counter", lambda: next(clock))
  for name in ("_propose", "_verify", "_commit"):
    monkeypatch.setattr(round_time, name, lambda *args: args[2])
  decoder = dataclasses.replace(tiny_model().decoder(), rounds_per_dispatch=2)
  found = round_time._time_parts(decoder, None, ())
  assert found == (1.5, 20, 200)


def test_memory_counts_each_array_once():
  model = tiny_model()
  found = round_time.describe_memory(model, SIZES)
  target = model.target.config
  row = 2 * target.num_layers * target.num_kv_heads * target.head_width * 4
  slots = SIZES.batch * (90 + 128)  # a piece of a prompt may be written past
  # Lengths of rows come on top.
  assert found["target_cache_bytes"] == row * slots + 4 * SIZES.batch
  assert found["trimmed_head_bytes"] == 0  # borrowed, not copied
  assert found["drafter_bytes"] == model.drafter_bytes > 0
  assert found["drafter_cache_bytes"] > 0
  assert found["peak_bytes"] > 2**20 and found["peak_of"]
  plain = round_time.describe_memory(model.without_drafter(), SIZES)
  assert plain["drafter_bytes"] == plain["drafter_cache_bytes"] == 0
  assert plain["target_bytes"] == found["target_bytes"]
