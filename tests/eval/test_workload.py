"""What is to be measured: planned, checked, described."""

import dataclasses

import pytest

from configs import agents
from dflash_jax.config import AgentsConfig, Config, ConfigError, DraftConfig
from eval import workload
from eval.workload import Workload
from tests.testing import tiny_model

CALLS = ("pair/first: {task}", "pair/second after first: {first}")


@pytest.fixture
def config(tmp_path):
  """A workload of five tasks and a system prompt."""
  tasks, system = tmp_path / "tasks.jsonl", tmp_path / "system.txt"
  tasks.write_text("".join(f'{{"prompt": "Task {i}"}}\n' for i in range(5)))
  system.write_text("\nBe brief.\n")
  return Config(
    drafter=DraftConfig(path="ngram"),
    agents=AgentsConfig(
      calls=CALLS,
      concurrency=(1, 2),
      chains=3,
      system=str(system),
      tasks=(str(tasks),),
      max_new_tokens=9,
    ),
  )


def changed(config, **fields):
  settings = dataclasses.replace(config.agents, **fields)
  return dataclasses.replace(config, agents=settings)


def test_a_plan_has_the_workflows_modes_and_tasks_of_the_config(config):
  plan = Workload.plan(changed(config, modes=("speculative", "plain")))
  assert [workflow.name for workflow in plan.workflows] == ["pair"]
  assert [mode.name for mode in plan.modes] == ["speculative", "plain"]
  assert plan.system == "Be brief."
  assert plan.tasks == [f"Task {i}" for i in range(3)]


def test_the_shipped_config_can_be_planned():
  config = agents.get_config()
  plan = Workload.plan(config)
  assert len(plan.tasks) == 32 and len(plan.modes) == 4
  assert "search_catalogue" in plan.system
  for tool in ("read_passage", "calculate", "run_program", "take_note"):
    assert f"\n{tool}: " in plan.system


def test_sizes_are_said_before_anything_runs(config):
  model = tiny_model(drafter=False)
  sizes = Workload.plan(config).describe(model)
  encode = model.tokenizer.encode
  head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
  tail = "<|im_end|>\n<|im_start|>assistant\n"
  common = len(encode(head))
  assert sizes["common_tokens"] == common
  # The second call shows a first reply of nine tokens, and answers in nine; no
  # token of the byte tokenizer is a word, so that those are its last letters.
  second = common + 9 + len(encode(tail)) + 9
  assert sizes["workflows"] == [
    {"name": "pair", "requests": 2, "depth": 2, "longest_tokens": second}
  ]
  short = dataclasses.replace(model.config.decode, max_length=second - 1)
  small = dataclasses.replace(
    model, config=dataclasses.replace(model.config, decode=short)
  )
  with pytest.raises(ConfigError, match="call 'pair/second', if all replies"):
    Workload.plan(config).describe(small)


def test_a_model_of_bare_ids_cannot_chat(config):
  with pytest.raises(ConfigError, match="no tokenizer, so it cannot chat"):
    Workload.plan(config).describe(tiny_model(31, drafter=False))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"calls": ()}, "calls is empty"),
    (
      {"workflows": ("trio",)},
      "'trio' is unknown; config.agents.calls has pair",
    ),
    ({"modes": ("fast",)}, "mode 'fast' is unknown"),
    ({"concurrency": ()}, r"concurrency=\(\) needs numbers"),
    ({"concurrency": (0,)}, r"concurrency=\(0,\) needs numbers, each at least"),
    ({"rows": ()}, r"rows=\(\) needs numbers"),
    ({"chains": 0}, "chains=0 and max_new_tokens=9 must be at least 1"),
    ({"system": "/none.txt"}, "system='/none.txt' cannot be read"),
    ({"tasks": ()}, "tasks is empty"),
    ({"concurrency": (7,)}, "7 chains .* need as many tasks, .* has 5; name"),
  ],
)
def test_a_mistake_is_named_before_a_model_is_loaded(config, fields, message):
  with pytest.raises(ConfigError, match=message):
    Workload.plan(changed(config, **fields))


def test_speculation_needs_a_drafter(config):
  plain = dataclasses.replace(config, drafter=DraftConfig(path="none"))
  with pytest.raises(ConfigError, match="no drafter for the speculative modes"):
    Workload.plan(plain)
  Workload.plan(changed(plain, modes=("plain", "plain+shared")))


def test_as_many_chains_as_are_wanted_and_no_fewer_than_are_in_flight():
  assert workload.count_chains(3, 1) == 3
  assert workload.count_chains(3, 8) == 8


def test_batches_are_as_large_as_requests_can_fill(config):
  plan = Workload.plan(changed(config, rows=(1, 2, 4, 8, 16)))
  assert plan.engine_config(4).sizes == (1, 2, 4)
  assert plan.engine_config(5).sizes == (1, 2, 4, 8)
  assert plan.engine_config(99).sizes == (1, 2, 4, 8, 16)
  assert plan.engine_config(999).queue > 999
  assert plan.engine_config(1).max_new_tokens == 9
