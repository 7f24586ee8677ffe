"""A few rows of each benchmark, of our own words, as it publishes its files."""

import gzip
import json
import pathlib

GSM8K = [
  {
    "question": f"A shelf holds {n} books and 3 more. How many?",
    "answer": f"It holds {n}+3=<<{n}+3={n + 3}>>{n + 3} books.\n#### {n + 3}",
  }
  for n in (5, 7, 11, 13, 1997)
]
MATH500 = [
  {
    "problem": f"What is ${n}/2$?",
    "solution": f"It is \\boxed{{\\frac{{{n}}}{{2}}}}.",
    "answer": f"\\frac{{{n}}}{{2}}",
    "subject": subject,
    "level": 1,
    "unique_id": f"test/{n}.json",
  }
  for n, subject in ((3, "Algebra"), (5, "Prealgebra"), (7, "Algebra"))
]
AIME25 = [
  {"problem": "How many?", "answer": "070", "id": "0"},
  {"problem": "And now?", "answer": 588, "id": "1"},
  {"problem": "Which angle?", "answer": "336^\\circ", "id": "2"},
]
HUMANEVAL = [
  {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef half(x):\n    """Half of x, rounded up.'
    '"""\n',
    "entry_point": "half",
    "canonical_solution": "    return math.ceil(x / 2)\n",
    "test": "def check(candidate):\n    assert candidate(5) == 3\n",
  },
  {
    "task_id": "HumanEval/1",
    "prompt": 'def twice(x):\n    """Two of x."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(5) == 10\n",
  },
]
MBPP = [
  {
    "source_file": "ours.ipynb",
    "task_id": number,
    "prompt": f"Write a function that adds {number}.",
    "code": f"def helper(x):\n  return x\n\ndef add(x):\n  return x + {number}",
    "test_imports": ["import math"],
    "test_list": [f"assert add(1) == {number + 1}", "assert add(0) > 0"],
  }
  for number in (10, 11, 510, 511)
]
LIVECODEBENCH = [
  {
    "question_title": "Sum",
    "question_content": "Print the sum.",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": "[]",
    "private_test_cases": "?",
  },
  {
    "question_title": "Product",
    "question_content": "Return the product.",
    "starter_code": "class Solution:\n    def product(self, x):\n        ",
    "difficulty": "hard",
    "public_test_cases": "[]",
    "private_test_cases": "?",
  },
]
MT_BENCH = [
  {
    "question_id": 80 + n,
    "category": category,
    "turns": [f"First question {n}.", f"Second question {n}."],
  }
  for n, category in enumerate(("writing", "math", "stem"), start=1)
]
ALPACA = [
  {"instruction": "Name a river.", "input": "", "output": "The Elbe."},
  {"instruction": "Sort.", "input": "3, 2, 5", "output": "2, 3, 5"},
]
SPEC_BENCH = [
  {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
  {"question_id": 161, "category": "translation", "turns": ["Translate: ja"]},
  {"question_id": 241, "category": "rag", "turns": ["Read. Who?"]},
]
SPEED_BENCH = [
  {
    "question_id": "a",
    "category": "coding",
    "sub_category": None,
    "turns": ["Code this."],
    "multiturn": False,
  },
  {
    "question_id": "b",
    "category": "roleplay",
    "sub_category": None,
    "turns": ["You are a cook.", "Cook.", "Serve."],
    "multiturn": True,
  },
]

# The file of each benchmark under DIR, and its rows.
FILES = {
  "gsm8k": ("gsm8k/test.jsonl", GSM8K),
  "math500": ("math500/test.jsonl", MATH500),
  "aime25": ("aime25/test.jsonl", AIME25),
  "humaneval": ("humaneval/HumanEval.jsonl.gz", HUMANEVAL),
  "mbpp": ("mbpp/sanitized-mbpp.json", MBPP),
  "livecodebench": ("livecodebench/test2.jsonl", LIVECODEBENCH),
  "mt-bench": ("mt-bench/question.jsonl", MT_BENCH),
  "alpaca": ("alpaca/alpaca_data.json", ALPACA),
  "spec-bench": ("spec-bench/question.jsonl", SPEC_BENCH),
  "speed-bench": ("speed-bench/test.jsonl", SPEED_BENCH),
}


def write(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
  """Writes rows in the format that the file's name says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = "".join(f"{json.dumps(row)}\n" for row in rows)
  if path.suffix == ".json":
    path.write_text(json.dumps(rows), encoding="utf-8")
  elif path.suffix == ".gz":
    path.write_bytes(gzip.compress(lines.encode()))
  else:
    path.write_text(lines, encoding="utf-8")
  return path


def publish(directory: pathlib.Path, *names: str) -> str:
  """Writes these benchmarks' files, all by default; gives the directory."""
  for name in names or FILES:
    file, rows = FILES[name]
    write(directory / file, rows)
  return str(directory)
