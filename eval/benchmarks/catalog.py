"""The benchmarks: where each is published, its files, columns and form."""

import dataclasses
from collections.abc import Callable

from eval.benchmarks import tasks
from eval.benchmarks.tasks import STEP_BY_STEP, Row, Task


@dataclasses.dataclass(frozen=True)
class Entry:
  """A benchmark, as published.

  Attributes:
    name: as --benchmark takes it.
    hub: dataset on the hub that `datasets` loads; "" if it is not there.
    config, split: of the dataset.
    urls: files that `datasets` loads instead, as JSON lines.
    published: where its files are, for people.
    files: names in DIR/NAME under which they are published; any one will do.
    parts: whether the files are parts, all of which are used that are there.
    read: makes a task of a row, or None if the row is not of the split.
    form: of its prompts, for the record; {column} stands for the row's text.
    scored: what makes a reply right, or "" if nothing checks it.
    read_tested, tested_form: instead of read and form where code is run.
  """

  name: str
  published: str
  files: tuple[str, ...]
  read: Callable[[Row], Task | None]
  form: str
  hub: str = ""
  config: str | None = None
  split: str = "test"
  urls: tuple[str, ...] = ()
  parts: bool = False
  scored: str = ""
  read_tested: Callable[[Row], Task | None] | None = None
  tested_form: str = ""


NUMBER = (
  "the last \\boxed{}, else what follows ####, else the last number, equal as "
  "a number"
)
BOXED = "the last \\boxed{}, equal as normalised text or as a number"
TESTS = "its code passes the benchmark's tests"
_LIVECODEBENCH = tuple(f"test{part}.jsonl" for part in ("", *"23456"))

ENTRIES = (
  Entry(
    "gsm8k",
    hub="openai/gsm8k",
    config="main",
    published="github.com/openai/grade-school-math in grade_school_math/data, "
    "or huggingface.co/datasets/openai/gsm8k",
    files=("test.jsonl", "main/test-00000-of-00001.parquet"),
    read=tasks.read_gsm8k,
    form="{question}" + STEP_BY_STEP,
    scored=NUMBER,
  ),
  Entry(
    "math500",
    hub="HuggingFaceH4/MATH-500",
    published="huggingface.co/datasets/HuggingFaceH4/MATH-500",
    files=("test.jsonl",),
    read=tasks.read_math500,
    form="{problem}" + STEP_BY_STEP,
    scored=BOXED,
  ),
  Entry(
    "aime25",
    hub="MathArena/aime_2025",
    split="train",
    published="huggingface.co/datasets/math-ai/aime25 as test.jsonl, or "
    "huggingface.co/datasets/MathArena/aime_2025",
    files=("test.jsonl", "data/train-00000-of-00001.parquet"),
    read=tasks.read_aime25,
    form="{problem}" + STEP_BY_STEP,
    scored=BOXED,
  ),
  Entry(
    "humaneval",
    hub="openai/openai_humaneval",
    published="github.com/openai/human-eval in data, or "
    "huggingface.co/datasets/openai/openai_humaneval",
    files=(
      "HumanEval.jsonl.gz",
      "HumanEval.jsonl",
      "openai_humaneval/test-00000-of-00001.parquet",
    ),
    read=tasks.read_humaneval,
    form="Write a solution to the following problem and make sure that it "
    "passes the tests:\n```python\n{prompt}\n```",
    scored=TESTS,
  ),
  Entry(
    "mbpp",
    hub="google-research-datasets/mbpp",
    config="sanitized",
    published="github.com/google-research/google-research in mbpp, or "
    "huggingface.co/datasets/google-research-datasets/mbpp",
    files=("sanitized-mbpp.json", "sanitized/test-00000-of-00001.parquet"),
    read=tasks.read_mbpp,
    form="{prompt}",
    scored=TESTS,
    read_tested=tasks.read_tested_mbpp,
    tested_form="You are an expert Python programmer, and here is your task: "
    "{prompt} Your code should pass these tests:\n\n{test_list}",
  ),
  Entry(
    "livecodebench",
    urls=tuple(
      f"hf://datasets/livecodebench/code_generation_lite/{name}"
      for name in _LIVECODEBENCH
    ),
    published="huggingface.co/datasets/livecodebench/code_generation_lite",
    files=_LIVECODEBENCH,
    parts=True,
    read=tasks.read_livecodebench,
    form="the role, ### Question: {question_content}, ### Format: "
    "{starter_code} or a stub, ### Answer:",
  ),
  Entry(
    "mt-bench",
    hub="HuggingFaceH4/mt_bench_prompts",
    split="train",
    published="github.com/lm-sys/FastChat in fastchat/llm_judge/data/mt_bench, "
    "or huggingface.co/datasets/HuggingFaceH4/mt_bench_prompts in raw",
    files=("question.jsonl",),
    read=tasks.read_mt_bench,
    form="{turns}, answered turn after turn",
  ),
  Entry(
    "alpaca",
    hub="tatsu-lab/alpaca",
    split="train",
    published="github.com/tatsu-lab/stanford_alpaca, or "
    "huggingface.co/datasets/tatsu-lab/alpaca",
    files=(
      "alpaca_data.json",
      "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
    ),
    read=tasks.read_alpaca,
    form="{instruction}, and \n\nInput:\n{input} if there is one",
  ),
  Entry(
    "spec-bench",
    urls=(
      "https://raw.githubusercontent.com/hemingkx/Spec-Bench/main/data/"
      "spec_bench/question.jsonl",
    ),
    published="github.com/hemingkx/Spec-Bench in data/spec_bench",
    files=("question.jsonl",),
    read=tasks.read_spec_bench,
    form="{turns}, answered turn after turn",
  ),
  Entry(
    "speed-bench",
    hub="nvidia/SPEED-Bench",
    config="qualitative",
    published="huggingface.co/datasets/nvidia/SPEED-Bench, completed by "
    "prepare_data.py --config qualitative of github.com/NVIDIA/Model-Optimizer "
    "in examples/specdec_bench",
    files=("test.jsonl", "test.parquet"),
    read=tasks.read_speed_bench,
    form="{turns}, answered turn after turn",
  ),
)
NAMES = tuple(entry.name for entry in ENTRIES)
