"""Workflows: the notation, its mistakes, the shape of a graph."""

import pytest

from configs import agents
from dflash_jax.config import ConfigError
from dflash_jax.sampling import Sampling
from eval import workflows
from eval.workflows import Call

LINES = (
  "team/writer after worker,critic tokens=64: All: {worker} And: {critic}",
  "team/worker*3 after planner temperature=0.5 top_k=7: {copy} of {planner}",
  "team/planner: Plan this: {task}",
  "team/critic continues planner after worker role=tool: {worker}",
  "alone/only:  a text: with a colon\nand a line  ",
)


def parse(*lines):
  return workflows.parse(lines)


def test_a_line_says_all_that_a_call_is():
  team, alone = parse(*LINES).values()
  assert [call.name for call in team.calls] == [
    "writer",
    "worker",
    "planner",
    "critic",
  ]
  writer, worker, _, critic = team.calls
  assert writer == Call(
    "writer",
    "All: {worker} And: {critic}",
    after=("worker", "critic"),
    tokens=64,
  )
  assert worker.copies == 3
  assert worker.sampling == Sampling(0.5, top_k=7)
  assert (critic.continues, critic.role) == ("planner", "tool")
  assert critic.needs == ("planner", "worker")
  assert alone.calls == (Call("only", "a text: with a colon\nand a line"),)


def test_a_graph_has_levels_whatever_the_order_of_lines():
  team, alone = parse(*LINES).values()
  assert team.levels == {"planner": 0, "worker": 1, "critic": 2, "writer": 3}
  assert (team.num_requests, team.depth, team.breadth) == (6, 4, 3)
  assert (alone.num_requests, alone.depth, alone.breadth) == (1, 1, 1)


def test_the_shipped_workflows_have_the_shapes_they_are_named_for():
  found = workflows.parse(agents.get_config().agents.calls)
  shapes = {
    name: (each.num_requests, each.depth, each.breadth)
    for name, each in found.items()
  }
  assert shapes == {
    "team": (7, 4, 4),
    "tools": (5, 5, 1),
    "debate": (10, 4, 3),
    "best": (6, 2, 5),
  }


# --- What is said -------------------------------------------------------------


def test_fields_show_the_task_the_copy_and_replies():
  call = Call("c", "{copy}/{task}: {one}; {two}", after=("one", "two"))
  text = call.say(1, "T", {"one": [" x\n"], "two": ["y", "z"]})
  assert text == "2/T: x; two 1: y\ntwo 2: z"


def test_a_conversation_is_not_told_what_it_said_itself():
  call = Call("c", "{two}", copies=3, continues="two")
  said = {"two": ["x", "y", "z"]}
  assert call.say(1, "", said) == "two 1: x\ntwo 3: z"
  other = Call("c", "{two}", copies=3, after=("two",))
  assert other.say(1, "", said) == "two 1: x\ntwo 2: y\ntwo 3: z"


def test_braces_in_tasks_replies_and_data_are_left_alone():
  call = Call("c", '{"a": 1} {task} {one}', after=("one",))
  assert call.say(0, "{one}", {"one": ["{task}"]}) == '{"a": 1} {one} {task}'


# --- Mistakes -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (["w/a"], "'w/a': no text; write a line like"),
    (["w/a:  "], "'w/a': no text"),
    (["a: x"], "'a' is not WORKFLOW/CALL"),
    ([": x"], "'' is not WORKFLOW/CALL"),
    (["w/a*0: x"], r"'w/a\*0' is not WORKFLOW/CALL"),
    (["w/a tokens=many: x"], "tokens takes a value of type int, not 'many'"),
    (["w/a tokens=0: x"], "tokens=0 is impossible; use at least 1"),
    (["w/a role=: x"], "role has no value"),
    (["w/a after: x"], "after has no value"),
    (["w/a continues: x"], "continues has no value"),
    (["w/a tokens=1 tokens=2: x"], "tokens stands there twice"),
    (["w/a before b: x"], "'before' is unknown; use continues CALL, after"),
    (["w/a depth=3: x"], "'depth=3' is unknown; .* tokens="),
    (["w/a temperature=-1: x"], "temperature=-1.0 is impossible"),
    (["w/task: x"], "call 'w/task' is what {task} means; rename"),
    (["w/a: x", "w/a: y"], "call 'w/a' stands there twice"),
    (["w/a after b: x"], "'w/a' waits for 'b', which is unknown; known: none"),
    (["w/a: x", "v/b after a: x"], "'v/b' waits for 'a', which is unknown"),
    (["w/a: x", "w/b: {a}"], "'w/b' shows {a}, but .* add 'after a'"),
    (["w/a: x", "w/b: {c}"], "shows {c}, but known: task, copy, a"),
    (
      ["w/a*2: x", "w/b*3 continues a: x"],
      "has 3 copies, but continues 'a' of 2; make it 2",
    ),
    (["w/a: x", "w/b continues a: {a}"], "holds already; drop it"),
    (["w/a after a: x"], "wait for each other: a -> a"),
    (
      ["w/a after c: x", "w/b continues a: x", "w/c after b: x"],
      "workflow 'w': calls wait for each other: a -> b -> c -> a",
    ),
  ],
)
def test_a_mistake_is_named_on_one_line_with_its_remedy(lines, message):
  with pytest.raises(ConfigError, match=message) as caught:
    parse(*lines)
  assert str(caught.value).startswith("config.agents.calls")
  assert "\n" not in str(caught.value)


def test_workflows_are_chosen_by_name_or_all():
  found = parse(*LINES)
  assert workflows.choose(found, ()) == list(found.values())
  assert workflows.choose(found, ("alone",)) == [found["alone"]]
  with pytest.raises(ConfigError, match="'crew' is unknown; .* team, alone"):
    workflows.choose(found, ("team", "crew"))
  with pytest.raises(ConfigError, match="calls is empty"):
    workflows.choose({}, ())
