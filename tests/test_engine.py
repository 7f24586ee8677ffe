"""The engine: who goes first, who is refused, and who pays for a failure."""

import dataclasses
import threading

import numpy as np
import pytest

from dflash_jax.config import ConfigError
from dflash_jax.engine import Engine, EngineConfig, Request
from dflash_jax.sampling import GREEDY, Sampling
from dflash_jax.serving.requests import Refused
from dflash_jax.session import Session
from tests.serving.schedules import check_empty, near_model
from tests.testing import tiny_model

VOCAB = 31
CONFIG = EngineConfig(
  sizes=(2,),
  queue=5,
  capacity=96,
  max_new_tokens=40,
  page=4,
  prefix_bytes=2**18,
  max_stops=2,
)
PROMPT = [3, 1, 4, 1, 5]


def plain_engine(config=CONFIG, **decode):
  decode = {"prefill_chunk": 16, "rounds_per_dispatch": 4} | decode
  return Engine(tiny_model(VOCAB, drafter=False, **decode), config)


def ask(engine, *requests):
  """Results, in order."""
  handles = [engine.submit(request) for request in requests]
  engine.run()
  return [handle.result(0) for handle in handles]


def request(prompt=PROMPT, budget=9, **options):
  return Request(prompt, max_new_tokens=budget, **options)


# --- Answers ------------------------------------------------------------------


@pytest.mark.parametrize("law", [GREEDY, Sampling(0.9, top_p=0.9)])
def test_a_request_gets_what_a_session_gives(law):
  model = near_model(prefill_chunk=16)
  (found,) = ask(
    Engine(model, CONFIG), request(budget=23, sampling=law, seed=8)
  )
  plain = model.without_drafter()
  session = Session(plain, plain.decoder(law), 1, 71, 31)
  (expected,) = session.reply([PROMPT], [23], seeds=[8])
  assert found.tokens == expected.tokens
  assert found.finish == "budget"
  assert found.rounds < 22  # drafts were accepted
  assert sum(found.accepted) == found.rounds
  assert found.tau == pytest.approx(22 / found.rounds)


def test_times_are_told_from_submission():
  (found,) = ask(plain_engine(), request(budget=9))
  assert 0 <= found.queued_s <= found.ttft_s <= found.total_s
  assert len(found.itl_s) == 8
  assert sum(found.itl_s) == pytest.approx(
    found.arrivals[-1][0] - found.arrivals[0][0]
  )
  assert [count for _, count in found.arrivals] == [1, 5, 9]  # R = 4
  assert found.tokens_per_s == pytest.approx(8 / sum(found.itl_s))


def test_streamed_tokens_are_the_reply():
  streamed, ends = [], []
  engine = plain_engine()
  (found,) = ask(
    engine,
    request(
      on_tokens=lambda ids, slots: streamed.append((ids, slots)),
      on_done=ends.append,
    ),
  )
  assert [len(ids) for ids, _ in streamed] == [1, 4, 4]
  assert sum((ids for ids, _ in streamed), []) == found.tokens
  assert sum((slots for _, slots in streamed), []) == found.slots
  assert ends == [found]


def test_each_request_has_its_own_stop_tokens():
  engine = plain_engine()
  (whole,) = ask(engine, request(budget=20))
  stop = whole.tokens[6]
  end = whole.tokens.index(stop) + 1
  stopped, free = ask(
    engine,
    request(budget=20, stop_ids=(stop,)),
    request(budget=20, stop_ids=()),
  )
  assert (stopped.tokens, stopped.finish) == (whole.tokens[:end], "stop")
  assert (free.tokens, free.finish) == (whole.tokens, "budget")


def test_a_stop_string_ends_a_reply_and_its_text():
  engine = Engine(
    tiny_model(drafter=False, prefill_chunk=16),
    dataclasses.replace(CONFIG, max_stops=4),
  )
  (whole,) = ask(engine, request("Hi", 30))
  assert len(whole.text) == 30
  string = whole.text[11:14]
  place = whole.text.index(string)
  (found,) = ask(engine, request("Hi", 30, stop_strings=("\0", string)))
  assert (found.text, found.finish) == (whole.text[:place], "string")
  assert found.tokens == whole.tokens[: place + 3]
  check_empty(engine)


def test_the_urgent_go_first_and_equals_in_turn():
  engine = plain_engine(dataclasses.replace(CONFIG, sizes=(1,)))
  order = []

  def note(name):
    return lambda result: order.append(name)

  for name, priority in [("a", 1), ("b", 0), ("c", 1), ("d", -1)]:
    engine.submit(request(priority=priority, on_done=note(name)))
  engine.run()
  assert order == ["d", "b", "a", "c"]


def test_a_callback_may_ask_for_more():
  """A chain of requests, each of which continues the last."""
  engine = plain_engine()
  replies = []

  def follow(result):
    replies.append(result.tokens)
    if len(replies) < 3:
      prompt = PROMPT + sum(replies, [])
      engine.submit(request(prompt, 6, on_done=follow))

  engine.submit(request(PROMPT, 6, on_done=follow))
  engine.run()
  (whole,) = ask(plain_engine(), request(PROMPT, 18))
  assert sum(replies, []) == whole.tokens
  # Replies are kept too: of 11 and 17 tokens, whole pages behind the last.
  assert engine.counters.hit_tokens == 8 + 16


def test_any_thread_may_submit_and_wait():
  engine = plain_engine()
  results = []

  def user():
    results.append(engine.submit(request()).result(60))

  threads = [threading.Thread(target=user) for _ in range(5)]
  for thread in threads:
    thread.start()
  while any(thread.is_alive() for thread in threads):
    engine.run()
  assert len({tuple(result.tokens) for result in results}) == 1


def test_batches_grow_and_shrink_with_the_requests():
  config = dataclasses.replace(CONFIG, sizes=(1, 2, 4))
  engine = plain_engine(config)
  lane = engine.lanes[""]
  sizes = []
  budgets = [40, 3, 9, 30]
  (alone,) = ask(plain_engine(), request(budget=40))
  handles = [engine.submit(request(budget=budget)) for budget in budgets]
  while engine.step():
    sizes.append(len(lane.seats))
  assert sizes[0] == 4 and sizes[-1] == 1 and 2 in sizes
  for handle, budget in zip(handles, budgets, strict=True):
    assert handle.result(0).tokens == alone.tokens[:budget]
  check_empty(engine)


# --- Shared prefixes ----------------------------------------------------------


def test_a_common_prompt_is_read_once():
  common = np.random.default_rng(0).integers(0, VOCAB, 50).tolist()
  prompts = [[*common, i, i + 1, 7] for i in range(5)]
  model = near_model()
  engine = Engine(model, CONFIG)
  shared = ask(engine, *[request(p, 17) for p in prompts])
  apart = ask(
    Engine(model, CONFIG),
    *[request(p, 17, shares_prefix=False) for p in prompts],
  )
  assert [r.hit_tokens for r in shared] == [0, 48, 48, 48, 48]
  assert engine.counters.read_tokens == 53 + 4 * 5
  assert engine.counters.hit_rate == pytest.approx(4 * 48 / (5 * 53))
  assert [r.tokens for r in shared] == [r.tokens for r in apart]
  assert [r.accepted for r in shared] == [r.accepted for r in apart]
  assert shared[0].tau > 1.3
  check_empty(engine)


def test_a_trunk_is_read_for_all_and_changes_no_token():
  """Also of what continues the reply of a row that leant on it."""
  common = np.random.default_rng(0).integers(0, VOCAB, 50).tolist()
  prompts = [[*common, i, i + 1, 7] for i in range(4)]
  model = near_model(rounds_per_dispatch=1)  # so that rows meet
  engine = Engine(model, dataclasses.replace(CONFIG, trunk=64))
  lane = engine.lanes[""]
  handles = [engine.submit(request(prompt, 17)) for prompt in prompts]
  handles.append(engine.submit(request(PROMPT, 17, priority=1)))
  members = []
  while engine.step():
    cache = lane._batch and lane._batch.cache
    if cache is not None and cache.trunk is not None:
      assert cache.trunk.length == 32  # of 48 in common, in calls of eight
      members.append(int(cache.member.sum()))
  assert max(members) == 2
  found = [handle.result(0) for handle in handles]
  longer = [*prompts[2], *found[2].tokens, 3, 1]
  (more,) = ask(engine, request(longer, 9))
  assert more.hit_tokens == 68  # of 53 + 16 in the caches
  apart = Engine(model, CONFIG)
  asked = [*[(p, 17) for p in prompts], (PROMPT, 17), (longer, 9)]
  for result, (prompt, budget) in zip([*found, more], asked, strict=True):
    (alone,) = ask(apart, request(prompt, budget, shares_prefix=False))
    assert result.tokens == alone.tokens
    assert result.accepted == alone.accepted
  check_empty(engine)


def test_a_store_without_room_only_costs_time():
  engine = plain_engine(dataclasses.replace(CONFIG, prefix_bytes=0))
  first, second = ask(engine, request(), request())
  assert first.tokens == second.tokens
  assert second.hit_tokens == 0


# --- Faults -------------------------------------------------------------------


def others_are_unharmed(engine, fault):
  """`fault` in company of two sound requests, whose answers are checked."""
  (alone,) = ask(plain_engine(), request(budget=20))
  before = engine.submit(request(budget=20))
  found = fault(engine)
  after = engine.submit(request(budget=20))
  engine.run()
  for handle in (before, after):
    assert handle.result(0).tokens == alone.tokens
  check_empty(engine)
  return found


def test_a_callback_that_raises_ends_its_request_alone():
  def on_tokens(ids, slots):
    raise ValueError("no more, thanks")

  def on_done(result):
    raise OSError("disk full")

  def fault(engine):
    return [
      engine.submit(request(budget=20, on_tokens=on_tokens)),
      engine.submit(request(budget=20, on_done=on_done)),
    ]

  cut, whole = others_are_unharmed(plain_engine(), fault)
  found = cut.result(0)
  assert found.finish == "error" and "no more" in str(found.error)
  assert 1 <= len(found.tokens) < 20
  found = whole.result(0)
  assert found.finish == "error" and "disk full" in str(found.error)
  assert len(found.tokens) == 20


@pytest.mark.parametrize("phase", ["waiting", "reading", "decoding"])
def test_a_request_is_cancelled_in_any_phase(phase):
  def fault(engine):
    lane = engine.lanes[""]
    long = list(range(20)) * 2
    handle = engine.submit(request(long, 30, priority=-1))
    if phase != "waiting":
      engine.step()
      assert lane.reading is not None
    if phase == "decoding":
      while lane.reading is not None:
        engine.step()
    handle.cancel()
    return handle

  found = others_are_unharmed(plain_engine(), fault).result(0)
  assert found.finish == "cancelled" and found.error is None
  assert bool(found.tokens) == (phase == "decoding")
  assert len(found.tokens) < 30


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (request([1] * 90, 9), "90 tokens of prompt .* budget of 9 .* of 96"),
    (request([]), "prompt is empty"),
    (request([5, 31]), "token 31 is none of the target's 31"),
    (request(budget=41), "max_new_tokens=41 .* between 1 and .* 40"),
    (request(budget=0), "max_new_tokens=0"),
    (request(seed=2**32), "seed=4294967296"),
    (request(lane="eagle"), "lane 'eagle' is unknown; this engine has ''"),
    (request(stop_ids=(1, 2, 3)), "3 stop tokens exceed .* max_stops=2"),
    (request("Hello!"), "no tokenizer"),
    (request(stop_strings=("x",)), "no tokenizer"),
  ],
)
def test_what_could_never_be_answered_is_refused(wrong, message):
  def fault(engine):
    with pytest.raises(Refused, match=message):
      engine.submit(wrong)

  others_are_unharmed(plain_engine(), fault)


def test_an_impossible_law_cannot_be_written_down():
  with pytest.raises(ConfigError, match="top_p=1.5 is impossible"):
    request(sampling=Sampling(1.0, top_p=1.5))


def test_a_full_queue_refuses_and_those_inside_are_answered():
  engine = plain_engine()
  handles, refused = [], 0
  for _ in range(50):
    try:
      handles.append(engine.submit(request()))
    except Refused as error:
      assert "queue is full: 5 requests wait, of at most 5" in str(error)
      refused += 1
  assert (len(handles), refused) == (5, 45)
  engine.run()
  assert len({tuple(handle.result(0).tokens) for handle in handles}) == 1
  check_empty(engine)


def test_a_lane_without_room_is_refused_with_numbers_and_others_run():
  model = near_model()
  models = {"none": model.without_drafter(), "near": model}
  sizes = Engine(models, CONFIG).lanes
  small, large = (lane.most_bytes(2) for lane in sizes.values())
  assert small < large
  config = dataclasses.replace(CONFIG, memory_bytes=small + large - 1)
  engine = Engine(models, config)

  def fault(engine):
    with pytest.raises(Refused, match="'near' has no room .* MiB .* raise mem"):
      engine.submit(request(lane="near"))

  handle = engine.submit(request())
  fault(engine)
  engine.run()
  assert len(handle.result(0).tokens) == 9
  assert engine.usage().peak_bytes <= config.memory_bytes
  check_empty(engine)


def test_a_closed_engine_holds_nothing_and_says_so():
  engine = plain_engine()
  handles = [engine.submit(request(budget=30)) for _ in range(4)]
  engine.step()
  engine.close()
  assert {handle.result(0).finish for handle in handles} == {"cancelled"}
  usage = engine.usage()
  assert (usage.rows, usage.waiting, usage.bytes, usage.pages_kept) == (0,) * 4
  with pytest.raises(Refused, match="closed"):
    engine.submit(request())


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ({"sizes": (4, 2)}, "sizes=.* ascending"),
    ({"sizes": (0, 2)}, "at least 1 row"),
    ({"sizes": ()}, "sizes="),
    ({"queue": 0}, "queue=0 is impossible"),
    ({"page": 1}, "page=1"),
    ({"prefix_bytes": -1}, "prefix_bytes=-1"),
  ],
)
def test_impossible_settings_are_named(setting, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(CONFIG, **setting)
