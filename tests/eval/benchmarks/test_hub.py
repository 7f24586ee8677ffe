"""Benchmarks from the hub: what is asked of it, and what if it is shut."""

import socket
import sys
import time
import types

import huggingface_hub
import pytest

from dflash_jax.prompts import PromptError
from eval.benchmarks import NAMES, hub, load
from tests.eval.benchmarks import published
from tests.eval.benchmarks.test_benchmark import ASKED, FILES_SAID, shuffled

# What `datasets` is asked for, by benchmark.
DATASETS = {
  "gsm8k": ("openai/gsm8k", "main", "test"),
  "math500": ("HuggingFaceH4/MATH-500", None, "test"),
  "aime25": ("MathArena/aime_2025", None, "train"),
  "humaneval": ("openai/openai_humaneval", None, "test"),
  "mbpp": ("google-research-datasets/mbpp", "sanitized", "test"),
  "mt-bench": ("HuggingFaceH4/mt_bench_prompts", None, "train"),
  "alpaca": ("tatsu-lab/alpaca", None, "train"),
  "speed-bench": ("nvidia/SPEED-Bench", "qualitative", "test"),
}


@pytest.fixture
def datasets(monkeypatch):
  """A stand-in for the package; its load_dataset is set by each test."""
  module = types.ModuleType("datasets")
  monkeypatch.setitem(sys.modules, "datasets", module)
  return module


@pytest.fixture
def network(monkeypatch):
  """Whatever is asked for is in reach."""
  monkeypatch.setattr(hub, "_reach", lambda entry: None)


@pytest.mark.parametrize("name", DATASETS)
def test_asks_the_hub_for_the_split_of_the_field(datasets, network, name):
  asked = []

  def load_dataset(path, config=None, *, split):
    asked.append((path, config, split))
    return published.FILES[name][1]

  datasets.load_dataset = load_dataset
  found = load(name)
  assert asked == [DATASETS[name]]
  assert [p.turns for p in found.prompts] == shuffled(ASKED[name])
  assert found.facts["source"] == "/".join(filter(None, DATASETS[name]))


def test_livecodebench_is_all_its_parts(datasets, network):
  def load_dataset(path, *, data_files, split):
    assert (path, split) == ("json", "train")
    assert [file.rpartition("/")[2] for file in data_files] == [
      f"test{part}.jsonl" for part in ("", 2, 3, 4, 5, 6)
    ]
    return published.LIVECODEBENCH

  datasets.load_dataset = load_dataset
  turns = [prompt.turns for prompt in load("livecodebench").prompts]
  assert turns == shuffled(ASKED["livecodebench"])


def test_spec_bench_is_fetched_from_where_it_is(
  datasets, network, monkeypatch, tmp_path
):
  path = published.write(tmp_path / "x.jsonl", published.SPEC_BENCH)

  def get(url):
    assert url.endswith("Spec-Bench/main/data/spec_bench/question.jsonl")
    return types.SimpleNamespace(
      raise_for_status=lambda: None, text=path.read_text()
    )

  session = types.SimpleNamespace(get=get)
  monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
  turns = [prompt.turns for prompt in load("spec-bench").prompts]
  assert turns == shuffled(ASKED["spec-bench"])


def test_a_row_of_the_hub_is_named_by_its_number(datasets, network):
  rows = [published.GSM8K[0], {"question": "?"}]
  datasets.load_dataset = lambda *_, **__: rows
  with pytest.raises(
    PromptError, match="openai/gsm8k/main/test, row 2: column"
  ):
    load("gsm8k")


@pytest.mark.parametrize("name", NAMES)
def test_shut_network_says_at_once_what_to_put_where(
  datasets, monkeypatch, name
):
  def refuse(*_, **__):
    raise OSError("Name or service not known")

  # However the hub's client looks for it.
  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  datasets.load_dataset = lambda *_, **__: pytest.fail("tried for long")
  start = time.monotonic()
  with pytest.raises(PromptError) as error:
    load(name)
  assert time.monotonic() - start < 10
  said = str(error.value)
  assert said.startswith(f"benchmark {name}: there is no --data_dir, and its ")
  assert FILES_SAID[name].removeprefix("put ").removesuffix(" there") in said
  assert f"into DIR/{name} and pass --data_dir=DIR" in said
  assert "\n" not in said


def test_offline_by_wish_takes_what_the_cache_has(datasets, monkeypatch):
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  datasets.load_dataset = lambda *_, **__: published.GSM8K
  assert len(load("gsm8k").prompts) == 5


@pytest.mark.parametrize("name", NAMES)
def test_without_datasets_the_extra_and_the_files_are_named(monkeypatch, name):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(PromptError) as error:
    load(name)
  said = str(error.value)
  assert "pip install 'dflash-jax[eval]'" in said
  assert f"into DIR/{name} and pass --data_dir=DIR" in said
