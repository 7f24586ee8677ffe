"""The program in a reply about code, made ready for its tests."""

import re

from eval.benchmarks.tasks import Program

_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def find_code(reply: str, name: str) -> str:
  """The reply's code: the first block that defines `name`, else the last.

  A reply without a block is taken as code. Thinking is left out.
  """
  answer = reply.rpartition("</think>")[2]
  blocks = _FENCE.findall(answer)
  for block in blocks:
    if _defines(block, name):
      return block
  return blocks[-1] if blocks else answer


def assemble(reply: str, program: Program) -> str:
  """Python that defines what the tests call.

  A reply that defines the function gets what the prompt says before it
  (imports, helpers); one that does not continues the prompt.
  """
  code = find_code(reply, program.name)
  if not program.prompt:
    return code
  if not _defines(code, program.name):
    return program.prompt + code
  start = re.search(
    rf"^def {re.escape(program.name)}\b", program.prompt, re.MULTILINE
  )
  before = program.prompt[: start.start()] if start else ""
  return f"{before}\n{code}"


def _defines(code: str, name: str) -> bool:
  pattern = rf"^(?:async\s+)?(?:def|class)\s+{re.escape(name) or r'\w+'}\b"
  return re.search(pattern, code, re.MULTILINE) is not None
