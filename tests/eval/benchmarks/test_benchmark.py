"""Benchmarks from files: what is asked, in which order, and every complaint."""

import gzip
import json
import random
import re

import pytest

from dflash_jax.config import ConfigError
from dflash_jax.prompts import PromptError
from eval.benchmarks import NAMES, load
from eval.benchmarks.catalog import ENTRIES
from eval.benchmarks.tasks import Program
from tests.eval.benchmarks import published

BOXED = (
  "\nPlease reason step by step, and put your final answer within \\boxed{}."
)
ROLE = (
  "You are an expert Python programmer. You will be given a question (problem "
  "specification) and will generate a correct Python program that matches the "
  "specification and passes all tests. You will NOT return anything except "
  "for the program\n\n"
)
# What each of the published rows asks, in their order.
ASKED = {
  "gsm8k": [
    (f"A shelf holds {n} books and 3 more. How many?{BOXED}",)
    for n in (5, 7, 11, 13, 1997)
  ],
  "math500": [(f"What is ${n}/2$?{BOXED}",) for n in (3, 5, 7)],
  "aime25": [
    (f"{asked}{BOXED}",) for asked in ("How many?", "And now?", "Which angle?")
  ],
  "humaneval": [
    (
      "Write a solution to the following problem and make sure that it passes "
      "the tests:\n```python\nimport math\n\n\ndef half(x):\n"
      '    """Half of x, rounded up."""\n\n```',
    ),
    (
      "Write a solution to the following problem and make sure that it passes "
      'the tests:\n```python\ndef twice(x):\n    """Two of x."""\n\n```',
    ),
  ],
  "mbpp": [(f"Write a function that adds {n}.",) for n in (11, 510)],
  "livecodebench": [
    (
      f"{ROLE}### Question:\nPrint the sum.\n\n"
      "### Format: Write your code in the following format:\n"
      "```python\n# YOUR CODE HERE\n```\n\n"
      "### Answer: (use the provided format with backticks)",
    ),
    (
      f"{ROLE}### Question:\nReturn the product.\n\n"
      "### Format: Use the following code structure:\n"
      "```python\nclass Solution:\n    def product(self, x):\n        \n```\n\n"
      "### Answer: (use the provided format with backticks)",
    ),
  ],
  "mt-bench": [
    (f"First question {n}.", f"Second question {n}.") for n in (1, 2, 3)
  ],
  "alpaca": [("Name a river.",), ("Sort.\n\nInput:\n3, 2, 5",)],
  "spec-bench": [("Write.", "Again."), ("Translate: ja",), ("Read. Who?",)],
  "speed-bench": [("Code this.",), ("You are a cook.", "Cook.", "Serve.")],
}
CATEGORIES = {
  "math500": ["Algebra", "Prealgebra", "Algebra"],
  "livecodebench": ["easy", "hard"],
  "mt-bench": ["writing", "math", "stem"],
  "spec-bench": ["mt_bench", "translation", "rag"],
  "speed-bench": ["coding", "roleplay"],
}
ANSWERS = {
  "gsm8k": ["8", "10", "14", "16", "2000"],
  "math500": [f"\\frac{{{n}}}{{2}}" for n in (3, 5, 7)],
  "aime25": ["070", "588", "336"],
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """A directory with the files of all benchmarks."""
  return published.publish(tmp_path_factory.mktemp("data"))


def shuffled(items, seed=42):
  """The order of z-lab's benchmark: random.Random(42) on the row numbers."""
  order = list(range(len(items)))
  random.Random(seed).shuffle(order)
  return [items[i] for i in order]


def test_every_benchmark_has_a_case_here():
  assert set(NAMES) == set(ASKED) == set(published.FILES)
  assert len(NAMES) == 10


# --- What is asked ------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_asks_what_the_field_asks(data_dir, name):
  found = load(name, data_dir)
  assert [prompt.turns for prompt in found.prompts] == shuffled(ASKED[name])
  assert found.name == found.facts["name"] == name
  # A form with a fixed text says it, word for word.
  for part in re.split(r"\{\w+\}", found.facts["prompt_form"]):
    if name in ("gsm8k", "math500", "aime25", "humaneval"):
      assert all(part in prompt.turns[0] for prompt in found.prompts)


@pytest.mark.parametrize("name", NAMES)
def test_category_and_answer_stay_with_their_prompt(data_dir, name):
  found = load(name, data_dir)
  categories = CATEGORIES.get(name, [""] * len(ASKED[name]))
  assert found.categories == shuffled(categories)
  if name in ANSWERS:
    assert found.references == shuffled(ANSWERS[name])
  elif name not in ("humaneval", "mbpp"):
    assert set(found.references) == {None}


def test_programs_come_with_their_tests(data_dir):
  found = dict(
    zip(
      [p.turns[0][-35:] for p in load("humaneval", data_dir).prompts],
      load("humaneval", data_dir).references,
      strict=True,
    )
  )
  twice = next(program for program in found.values() if program.name == "twice")
  assert twice == Program(
    "twice",
    "def check(candidate):\n    assert candidate(5) == 10\n\ncheck(twice)\n",
    'def twice(x):\n    """Two of x."""\n',
  )
  mbpp = load("mbpp", data_dir)
  assert [p.name for p in mbpp.references] == ["add", "add"]
  for prompt, program in zip(mbpp.prompts, mbpp.references, strict=True):
    number = int(re.findall(r"\d+", prompt.turns[0])[0])
    assert program.tests == (
      f"import math\nassert add(1) == {number + 1}\nassert add(0) > 0\n"
    )


def test_mbpp_shows_its_tests_where_they_are_run(data_dir):
  found = load("mbpp", data_dir, run_code=True)
  (first, _) = shuffled([11, 510])
  assert found.prompts[0].turns == (
    "You are an expert Python programmer, and here is your task: Write a "
    f"function that adds {first}. Your code should pass these tests:\n\n"
    f"assert add(1) == {first + 1}\nassert add(0) > 0",
  )
  assert "Your code should pass" in found.facts["prompt_form"]
  same = load("gsm8k", data_dir, run_code=True)
  assert same == load("gsm8k", data_dir)


def test_mt_bench_of_the_hub_calls_its_turns_prompt(tmp_path):
  rows = [{"prompt": ["a", "b"], "category": "math", "prompt_id": 5}]
  published.write(tmp_path / "mt-bench" / "question.jsonl", rows)
  (prompt,) = load("mt-bench", str(tmp_path)).prompts
  assert prompt.turns == ("a", "b")


# --- Order and number ---------------------------------------------------------


def test_limit_takes_the_first_of_one_order(data_dir):
  everything = load("gsm8k", data_dir).prompts
  for limit in (1, 3, 5, 7):
    found = load("gsm8k", data_dir, limit)
    assert found.prompts == everything[:limit]
    assert found.facts["prompts"] == min(limit, 5)
    assert found.facts["of"] == 5


def test_seed_decides_the_order_and_is_said(data_dir):
  default, again = load("gsm8k", data_dir), load("gsm8k", data_dir, seed=42)
  assert default == again
  assert default.facts["seed"] == 42
  other = load("gsm8k", data_dir, seed=3)
  assert [p.turns for p in other.prompts] == shuffled(ASKED["gsm8k"], 3)
  assert other.prompts != default.prompts
  assert other.facts["prompts_sha256"] != default.facts["prompts_sha256"]


def test_same_prompts_have_one_digest_whatever_the_file(data_dir, tmp_path):
  published.write(
    tmp_path / "humaneval" / "HumanEval.jsonl", published.HUMANEVAL
  )
  plain, packed = load("humaneval", str(tmp_path)), load("humaneval", data_dir)
  assert plain.facts["source"] != packed.facts["source"]
  assert plain.facts["prompts_sha256"] == packed.facts["prompts_sha256"]


def test_parts_that_are_there_are_all_read_in_order(tmp_path):
  rows = [
    published.LIVECODEBENCH[0] | {"question_content": f"Part {part}?"}
    for part in range(3)
  ]
  for part, name in enumerate(("test", "test3", "test6")):
    published.write(tmp_path / "livecodebench" / f"{name}.jsonl", [rows[part]])
  found = load("livecodebench", str(tmp_path))
  questions = [re.findall(r"Part \d", p.turns[0])[0] for p in found.prompts]
  assert questions == shuffled(["Part 0", "Part 1", "Part 2"])
  assert found.facts["source"].count("jsonl") == 3


# --- Complaints ---------------------------------------------------------------

FILES_SAID = {
  "gsm8k": "test.jsonl or main/test-00000-of-00001.parquet",
  "math500": "put test.jsonl there",
  "aime25": "test.jsonl or data/train-00000-of-00001.parquet",
  "humaneval": "HumanEval.jsonl.gz or HumanEval.jsonl or "
  "openai_humaneval/test-00000-of-00001.parquet",
  "mbpp": "sanitized-mbpp.json or sanitized/test-00000-of-00001.parquet",
  "livecodebench": "one or more of test.jsonl, test2.jsonl, test3.jsonl, "
  "test4.jsonl, test5.jsonl, test6.jsonl",
  "mt-bench": "put question.jsonl there",
  "alpaca": "alpaca_data.json or "
  "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
  "spec-bench": "put question.jsonl there",
  "speed-bench": "test.jsonl or test.parquet",
}


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_says_what_to_put_where(tmp_path, name):
  with pytest.raises(PromptError) as complaint:
    load(name, str(tmp_path))
  said = str(complaint.value)
  (entry,) = [entry for entry in ENTRIES if entry.name == name]
  assert f"no data in {tmp_path / name}, which does not exist" in said
  assert FILES_SAID[name] in said
  assert said.endswith(f"as published at {entry.published}")
  (tmp_path / name).mkdir()
  with pytest.raises(PromptError, match=f"no data in {tmp_path / name}; put"):
    load(name, str(tmp_path))


def test_unknown_name_is_told_the_known_ones(data_dir):
  with pytest.raises(ConfigError, match="gsm9k is unknown; .*speed-bench"):
    load("gsm9k", data_dir)


@pytest.mark.parametrize(
  ("name", "change", "complaint"),
  [
    ("gsm8k", {"question": None}, "column 'question' needs text"),
    ("gsm8k", {"answer": "8"}, "column 'answer' needs the result after '####'"),
    ("math500", {"subject": ""}, "column 'subject' needs text"),
    ("aime25", {"answer": "1000"}, "a whole number from 0 to 999"),
    ("aime25", {"answer": "x"}, "a whole number from 0 to 999"),
    ("humaneval", {"test": 5.0}, "column 'test' needs text"),
    ("mbpp", {"task_id": "12"}, "column 'task_id' needs a whole number"),
    ("mbpp", {"task_id": 12, "test_list": []}, "'test_list' needs a list"),
    ("livecodebench", {"difficulty": None}, "column 'difficulty' needs text"),
    ("mt-bench", {"turns": ["one"]}, "asks in two turns, not 1"),
    ("mt-bench", {"turns": ["one", ""]}, "needs a list of texts"),
    ("alpaca", {"input": None}, "column 'input' needs text"),
    ("spec-bench", {"turns": "one"}, "needs a list of texts"),
    (
      "speed-bench",
      {"turns": ["a", "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"]},
      "complete the data with prepare_data.py",
    ),
  ],
)
def test_bad_column_is_named_by_file_and_line(
  tmp_path, name, change, complaint
):
  file, rows = published.FILES[name]
  path = published.write(tmp_path / file, [rows[0] | change])
  where = "row 1" if path.suffix == ".json" else "line 1"
  with pytest.raises(PromptError) as error:
    load(name, str(tmp_path))
  assert str(error.value).startswith(f"{path}, {where}: ")
  assert complaint in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_missing_column_is_told_what_is_there(tmp_path, name):
  file, _ = published.FILES[name]
  published.write(tmp_path / file, [{"text": "hello", "id": 3}])
  with pytest.raises(
    PromptError, match=r"1: column '.*' (is missing; it has 'text', 'id'|needs)"
  ):
    load(name, str(tmp_path))


@pytest.mark.parametrize(
  ("file", "content", "complaint"),
  [
    ("gsm8k/test.jsonl", b'{"question": "a"', "line 1: not JSON"),
    ("gsm8k/test.jsonl", b"\n[1, 2]\n", "line 2: expected an object"),
    ("gsm8k/test.jsonl", b"\xff\xfe", "cannot be read"),
    ("gsm8k/test.jsonl", b"\n\n", "holds no task of the test split"),
    ("mbpp/sanitized-mbpp.json", b'[\n{"a": 1},\n{', "line 3: not JSON"),
    ("mbpp/sanitized-mbpp.json", b'{"a": 1}', "a list of objects, found dict"),
    ("mbpp/sanitized-mbpp.json", b"[5]", "row 1: expected an object"),
    ("humaneval/HumanEval.jsonl.gz", b"no gzip", "cannot be read"),
    (
      "humaneval/HumanEval.jsonl.gz",
      gzip.compress(json.dumps(published.HUMANEVAL[0]).encode() * 9)[:-40],
      "cannot be read",
    ),
  ],
)
def test_damaged_file_is_named(tmp_path, file, content, complaint):
  path = tmp_path / file
  path.parent.mkdir()
  path.write_bytes(content)
  with pytest.raises(PromptError) as error:
    load(path.parent.name, str(tmp_path))
  assert str(path) in str(error.value) and complaint in str(error.value)


def test_parquet_without_datasets_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "datasets", None)
  path = tmp_path / "speed-bench" / "test.parquet"
  path.parent.mkdir()
  path.write_bytes(b"PAR1")
  with pytest.raises(PromptError, match=r"test\.parquet: .*dflash-jax\[eval\]"):
    load("speed-bench", str(tmp_path))
