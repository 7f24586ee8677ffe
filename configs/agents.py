r"""Workflows of many agents on the default target and drafter.

    python -m eval.agents --config=configs/agents.py --workflows=team \
      --concurrency=1,4,8 --plot_out=agents.png --report=agents.md

Four workflows, each in four modes: plain and speculative, with shared prefixes
and without. A plain chain takes a 2-core CPU 16 to 30 seconds; a measurement is
of max(--chains, chains in flight) in each mode. `--workflows=team
--concurrency=1 --chains=1` shows the flow in some minutes. docs/serving.md
explains notation and numbers.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import AgentsConfig, Config

BASE = pathlib.Path(__file__).parent / "smollm2_135m.py"
PROMPTS = pathlib.Path(__file__).parents[1] / "eval" / "prompts"

# A plan, four who carry it out, one who checks, one who writes.
TEAM = (
  "team/planner: You are the planner. Split the task into four steps, one "
  "line each, that four workers can do at the same time. Task: {task}",
  "team/worker*4 after planner: You are worker {copy} of 4. Do step {copy} of "
  "the plan in two or three sentences.\nTask: {task}\nPlan:\n{planner}",
  "team/critic after worker tokens=32: You are the critic. Name the most "
  "important mistake or gap in what the workers wrote, in one sentence.\n"
  "Task: {task}\n{worker}",
  "team/writer after worker,critic tokens=64: You are the writer. Write the "
  "final answer from what the workers wrote; mind the critic.\nTask: {task}\n"
  "{worker}\nCritic: {critic}",
)

# One conversation; the tools' answers are canned, whatever was called.
TOOLS = (
  "tools/first: You are a worker. Use the tools before you answer. Begin with "
  "a call of search_catalogue. Task: {task}",
  'tools/second continues first role=tool: [{"id": "b17", "title": "The Handy '
  'Book of Everyday Questions", "author": "M. Okafor", "year": 2011, "shelf": '
  '"A3"}, {"id": "b52", "title": "How Things Work Around the House", "author": '
  '"L. Brandt", "year": 1998, "shelf": "C1"}]',
  'tools/third continues second role=tool: {"text": "Most puzzles of this kind '
  "give way when they are taken apart: write down what is known, then what is "
  "asked, and look for the one step between the two that nobody has "
  'explained yet.", "page": 42}',
  'tools/fourth continues third role=tool: {"result": 36, "unit": ""}',
  "tools/answer continues fourth tokens=64: That was the last tool. Now answer "
  "the task: {task}",
)

# Three opinions, two exchanges, one verdict.
DEBATE = (
  "debate/opening*3: You are debater {copy} of 3. Give your own answer to the "
  "task and the best reason for it, in three sentences. Task: {task}",
  "debate/reply*3 continues opening: The others said:\n{opening}\nWhere they "
  "are right, change your answer; where they are wrong, say why.",
  "debate/last*3 continues reply tokens=32: The others now say:\n{reply}\nGive "
  "your last word in one sentence.",
  "debate/verdict after last: You are the judge of a debate on this task: "
  "{task}\nThe last words were:\n{last}\nSay which is best, and why.",
)

# Five drawn answers to the same prompt, and a choice.
BEST = (
  "best/draft*5 temperature=0.8 top_p=0.95: You are the writer. Answer the "
  "task. Task: {task}",
  "best/judge after draft tokens=32: You are the judge. Five answers to the "
  "task {task}\n{draft}\nSay which draft is best and why, in one sentence.",
)


def get_config() -> Config:
  """About 1,000 tokens of system prompt and tools; replies of 32 to 64."""
  base = config_file.read(BASE)
  return dataclasses.replace(
    base,
    name="agents",
    decode=dataclasses.replace(base.decode, width="goodput", max_length=1792),
    agents=AgentsConfig(
      calls=(*TEAM, *TOOLS, *DEBATE, *BEST),
      system=str(PROMPTS / "agents_system.txt"),
      tasks=(str(PROMPTS / "mixed.jsonl"),),
    ),
  )
