"""Chains on the real engine: the same in each mode, and nothing left behind."""

import dataclasses
import functools
import itertools
import time

import jax
import pytest

from configs import agents
from dflash_jax.config import ConfigError
from dflash_jax.engine import EngineConfig, Request
from dflash_jax.sampling import GREEDY, Sampling
from eval import closed_loop, workflows, workload
from eval.chains import Chain, Conversation
from eval.closed_loop import MODES, Server
from eval.rehearsal import rehearse
from tests.serving.schedules import check_empty, near_model

PAGE = 32  # the engine's default
CONFIG = EngineConfig(sizes=(3,), max_new_tokens=7, prefix_bytes=2**23)
SYSTEM = {"role": "system", "content": "You are one of several agents."}


def shipped():
  """The shipped workflows, what they say cut down to names and fields."""

  def cut(call):
    text = " ".join([call.name, *(f"{{{name}}}" for name in call.fields)])
    return dataclasses.replace(call, text=text, tokens=0)

  found = workflows.parse(agents.get_config().agents.calls)
  return {
    name: dataclasses.replace(
      workflow,
      calls=tuple(map(cut, workflow.calls)),
    )
    for name, workflow in found.items()
  }


@pytest.fixture(scope="module")
def model():
  """Random, one token per byte, with drafts that are often right."""
  return near_model(
    vocab=263, max_length=500, prefill_chunk=64, rounds_per_dispatch=3
  )


def maker(model, workflow, tokens=7):
  opening = Conversation(model.tokenizer, model.stop_ids, (SYSTEM,))

  def new_chain(number):
    task = f"Task {number}."
    return Chain(
      workflow, task, opening, max_new_tokens=tokens, seed=(0, number)
    )

  return new_chain


@pytest.fixture(scope="module")
def runs(model):
  """By the name of a shipped workflow: one chain in each mode."""

  @functools.cache
  def serve(name):
    found = {}
    for mode in MODES.values():
      server = Server(model, mode, CONFIG)
      server.open()
      assert server.engine.usage().pages_kept == 0
      make = maker(model, shipped()[name])
      found[mode.name] = server.serve(range(1), 1, make)
      check_empty(server.engine)
    return found

  return serve


NAMES = (
  "team",
  "tools",
  "best",
  pytest.param("debate", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_chain_is_the_same_in_every_mode(runs, name):
  plain = runs(name)["plain"]
  assert len(plain.replies) == shipped()[name].num_requests
  assert plain.seconds.keys() == {0}
  for mode in MODES:
    run = runs(name)[mode]
    assert run.replies.keys() == plain.replies.keys()
    for key, reply in run.replies.items():
      assert reply.prompt == plain.replies[key].prompt, (mode, key)
      assert reply.result.tokens == plain.replies[key].result.tokens


@pytest.mark.parametrize("name", NAMES)
def test_only_sharing_finds_prefixes_and_only_drafts_save_rounds(runs, name):
  for mode in MODES.values():
    run = runs(name)[mode.name]
    results = [reply.result for reply in run.replies.values()]
    assert any(result.hit_tokens for result in results) == mode.shares
    assert any(result.tau > 1 for result in results) == mode.drafts


def test_who_depends_on_others_reads_what_they_said(runs, model):
  replies = runs("team")["speculative+shared"].replies

  def said(call, copy=0):
    return replies[0, call, copy].result.text.strip()

  def read(call, copy=0):
    return model.tokenizer.decode(replies[0, call, copy].prompt)

  assert all(said("planner") in read("worker", copy) for copy in range(4))
  for copy in range(4):
    assert said("worker", copy) in read("critic")
    assert said("worker", copy) in read("writer")
  assert said("critic") in read("writer")
  assert "Task 0." in read("planner")


def test_drawn_drafts_of_a_prompt_differ(runs):
  replies = runs("best")["speculative+shared"].replies
  drafts = [replies[0, "draft", copy] for copy in range(5)]
  assert len({draft.prompt for draft in drafts}) == 1
  assert len({tuple(draft.result.tokens) for draft in drafts}) == 5


def test_a_conversation_that_goes_on_finds_its_reply_in_pages(runs):
  """All of it but what fills no page, and the reply's unread last token."""
  replies = runs("tools")["speculative+shared"].replies
  calls = [call.name for call in shipped()["tools"].calls]
  for before, after in zip(calls, calls[1:], strict=False):
    held, found = replies[0, before, 0], replies[0, after, 0]
    text = (*held.prompt, *held.result.tokens)
    assert found.prompt[: len(text)] == text
    assert found.result.hit_tokens == (len(text) - 1) // PAGE * PAGE


# --- The loop -----------------------------------------------------------------


def test_so_many_chains_are_in_flight_and_no_more(model):
  workflow = shipped()["team"]
  server = Server(model, MODES["speculative+shared"], CONFIG)
  make, started, live = maker(model, workflow), [], []

  def new_chain(number):
    started.append(make(number))
    live.append(sum(not chain.is_done for chain in started))
    return started[-1]

  run = server.serve(range(5), 2, new_chain)
  assert live == [1, 2, 2, 2, 2]
  assert run.seconds.keys() == set(range(5))
  assert run.wall_s >= max(run.seconds.values())
  assert 0 <= run.idle_s < run.wall_s
  check_empty(server.engine)


def test_no_time_passes_for_chains_whose_server_waits_for_its_turn(model):
  workflow = shipped()["team"]
  modes = closed_loop.choose_modes(("plain", "speculative+shared"))
  alone = Server(model, modes[1], CONFIG).serve(
    range(3), 2, maker(model, workflow)
  )
  ended, begun = [], time.perf_counter()
  runs = workload.serve_in_turns(
    [Server(model, mode, CONFIG) for mode in modes],
    range(3),
    2,
    maker(model, workflow),
    turn_s=0.0,  # a turn of the engine each
    on_chains=ended.append,
  )
  elapsed = time.perf_counter() - begun
  assert len(ended) > 2 * len(modes) and sum(ended) == 3 * len(modes)
  assert sum(run.wall_s for run in runs.values()) <= elapsed
  for run in runs.values():
    assert max(run.seconds.values()) <= run.wall_s
    assert 0 <= run.idle_s < run.wall_s
    for key, reply in run.replies.items():
      assert reply.result.tokens == alone.replies[key].result.tokens
      assert reply.result.total_s <= run.wall_s


def test_a_stopwatch_stands_still_until_it_is_started():
  watch = closed_loop.Stopwatch()
  readings = [watch()]
  for _ in range(2):
    watch.start()
    time.sleep(0.01)
    watch.stop()
    readings.append(watch())
    time.sleep(0.01)
    assert watch() == readings[-1]
  assert readings[0] == 0
  assert readings[1] >= 0.01 and readings[2] >= readings[1] + 0.01


def test_what_the_engine_refuses_is_raised(model):
  workflow = workflows.parse(["w/a: x", f"w/b after a: {'long ' * 400}"])["w"]
  server = Server(model, MODES["plain"], CONFIG)
  with pytest.raises(ConfigError, match="exceed the capacity of 500"):
    server.serve(range(1), 1, maker(model, workflow))
  with pytest.raises(ConfigError, match="'w/b', if all .* capacity of 500"):
    workload.check_capacity(model, workflow, [maker(model, workflow)(0)])


def test_capacity_is_that_of_the_longest_replies(model):
  workflow = workflows.parse(["w/a: x", "w/b continues a tokens=5: y"])["w"]
  make = maker(model, workflow)
  found = workload.check_capacity(model, workflow, [make(0), make(1)])
  run = Server(model, MODES["plain"], CONFIG).serve(range(1), 1, make)
  assert found == len(run.replies[0, "b", 0].prompt) + 5


@pytest.mark.slow
@pytest.mark.parametrize("width", ["fixed:3", "goodput"])
def test_nothing_is_compiled_while_the_clock_runs(width):
  """Batches of three sizes, drawn and greedy, that grow and shrink."""
  model = near_model(vocab=263, max_length=500, prefill_chunk=64, width=width)
  workflow = workflows.parse(
    ["w/a*3 temperature=0.7: {task}", "w/b*2 after a: {a}"]
  )["w"]
  config = dataclasses.replace(CONFIG, sizes=(1, 2, 4))
  laws = [call.sampling for call in workflow.calls]
  modes = closed_loop.choose_modes(("plain", "speculative+shared"))
  for mode in modes:
    rehearse(model, mode, config, laws)
  ended = []
  plain, shared = workload.serve_in_turns(
    [Server(model, mode, config) for mode in modes],
    range(8),
    2,
    maker(model, workflow),
    turn_s=0.2,
    on_chains=ended.append,
  ).values()
  assert sum(ended) == 16
  assert plain.seconds.keys() == shared.seconds.keys() == set(range(8))
  assert (plain.compiled, shared.compiled) == ([], [])
  for key, reply in shared.replies.items():
    assert reply.result.tokens == plain.replies[key].result.tokens


@pytest.mark.slow
def test_every_size_law_and_way_to_decode_is_rehearsed():
  """Drafting or not, whatever the policy would have made of it."""
  model = near_model(
    vocab=263, max_length=200, prefill_chunk=64, width="goodput"
  )
  config = dataclasses.replace(CONFIG, sizes=(1, 3), max_new_tokens=24)
  laws = (GREEDY, Sampling(temperature=0.8, top_p=0.95))
  mode = MODES["speculative+shared"]
  rehearse(model, mode, config, laws)
  server = Server(model, mode, config)
  server.open()
  (lane,) = server.engine.lanes.values()
  with closed_loop.naming_compilations() as names:
    cases = itertools.product(reversed(laws), (3, 1), (False, True))
    for law, rows, drafts in cases:
      for row in range(rows):
        prompt = [row + 1] * 40
        server.engine.submit(
          Request(prompt, max_new_tokens=24, sampling=law, stop_ids=())
        )
      lane.wants_drafts = drafts
      server.engine.run()
  assert names == []


def test_a_compilation_is_seen():
  with closed_loop.naming_compilations() as names:
    jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
  assert len(names) == 1
  jax.jit(lambda x: x * 5 - 1)(2.0).block_until_ready()
  assert len(names) == 1


def test_modes_are_chosen_by_name():
  names = ("speculative", "plain", "speculative")
  found = closed_loop.choose_modes(names)
  assert [mode.name for mode in found] == ["speculative", "plain"]
  with pytest.raises(ConfigError, match="'fast' is unknown; .* plain.shared"):
    closed_loop.choose_modes(("fast",))
  with pytest.raises(ConfigError, match="modes is empty"):
    closed_loop.choose_modes(())
