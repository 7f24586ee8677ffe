"""Programs in replies: which block counts, and what surrounds it."""

from eval.benchmarks.programs import assemble, find_code
from eval.benchmarks.tasks import Program

PROMPT = (
  'import math\n\ndef aid(x):\n  return x\n\ndef half(x):\n  """Half."""\n'
)
HALF = Program("half", "assert half(4) == 2\n", PROMPT)


def test_first_block_that_defines_the_function_counts():
  reply = (
    "Like this:\n```python\ndef other():\n  pass\n```\nNo:\n"
    "```python\ndef half(x):\n  return x / 2\n```\nUse it:\n"
    "```python\nprint(half(3))\n```"
  )
  assert find_code(reply, "half") == "def half(x):\n  return x / 2\n"
  assert find_code(reply, "absent") == "print(half(3))\n"
  assert find_code(reply, "") == "def other():\n  pass\n"


def test_block_cut_off_by_the_budget_counts_as_far_as_it_goes():
  assert find_code("```python\ndef half(x):\n  return", "half") == (
    "def half(x):\n  return"
  )


def test_reply_without_a_block_is_code():
  assert find_code("def half(x):\n  return x", "half").startswith("def half")


def test_thinking_is_no_program():
  reply = (
    "<think>```python\ndef half(x): bad\n```</think>\n```\ndef half(x): x\n```"
  )
  assert find_code(reply, "half") == "def half(x): x\n"


def test_whole_function_gets_what_stands_before_it_in_the_prompt():
  reply = "```python\ndef half(x):\n  return math.ceil(aid(x) / 2)\n```"
  namespace = {}
  exec(assemble(reply, HALF), namespace)
  assert namespace["half"](5) == 3


def test_body_alone_continues_the_prompt():
  namespace = {}
  exec(assemble("```python\n  return math.floor(x / 2)\n```", HALF), namespace)
  assert namespace["half"](5) == 2


def test_program_without_a_prompt_is_the_reply_alone():
  program = Program("add", "assert add(1) == 2")
  reply = "```python\ndef add(x):\n  return x + 1\n```"
  assert assemble(reply, program) == "def add(x):\n  return x + 1\n"
