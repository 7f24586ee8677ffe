"""Synthesis: what is asked, what is kept, and a kill in the middle."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from configs.tiny import get_config
from dflash_jax.config import Config, ConfigError
from dflash_jax.model import load
from dflash_jax.prompts import PromptError
from dflash_jax.session import Completion
from tests.train.conftest import greedy_answers
from tests.train.programs import failed_clearly, run
from train import synthesize as synthesis
from train.corpus import Corpus, CorpusError
from train.corpus_writer import is_held_out
from train.synthesize import interleave, is_loop, synthesize

QUESTIONS = 21


def write_questions(path: pathlib.Path) -> pathlib.Path:
  """Questions, one of them twice, one too long, one with a second turn."""
  records = [{"question": f"Question {i}?"} for i in range(QUESTIONS - 3)]
  records += [{"prompt": " Question 3? "}, {"prompt": "long " * 60}]
  records += [{"turns": ["First turn", "second turn"]}]
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  return path


def command(questions: pathlib.Path, output: pathlib.Path) -> list[str]:
  return [
    "--config=configs/tiny.py",
    f"--config.synthesis.prompts=('{questions}',)",
    f"--config.synthesis.output={output}",
    "--config.synthesis.num_self_prompts=24",
    "--config.synthesis.prompt_tokens=40",
    "--config.synthesis.max_answer_tokens=24",
    "--config.synthesis.batch_size=8",
    "--config.synthesis.shard_sequences=8",
    "--config.synthesis.answer_temperature=0.0",
    "--config.synthesis.dtype=float32",
  ]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> pathlib.Path:
  """A prompt file."""
  return write_questions(tmp_path_factory.mktemp("prompts") / "asked.jsonl")


@pytest.fixture(scope="module")
def output(questions, compiled, tmp_path_factory) -> pathlib.Path:
  """The corpus of an uninterrupted run."""
  path = tmp_path_factory.mktemp("whole") / "corpus"
  result = run("train.synthesize", *command(questions, path), cache=compiled)
  assert result.returncode == 0, result.stderr
  assert "tokens/s" in result.stderr
  return path


def contents(directory: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def index(directory: pathlib.Path) -> dict:
  path = directory / "index.json"
  return json.loads(path.read_text()) if path.exists() else {}


# --- Whole runs ---------------------------------------------------------------


def test_a_run_out_of_disk_and_then_killed_ends_with_the_same_bytes(
  questions, output, compiled, tmp_path
):
  whole = index(output)
  assert len(whole["prompts"]) == 3 and len(whole["shards"]) >= 3
  arguments = command(questions, tmp_path)
  # Too small for the index of two files of prompts.
  text = json.dumps(whole | {"shards": [], "totals": {}}, indent=1)
  full = run(
    "train.synthesize", *arguments, cache=compiled, file_limit=len(text) - 300
  )
  line = failed_clearly(full)
  assert "cannot write" in line and "run the same command again" in line
  assert not list(tmp_path.glob("*.partial"))
  stopped = index(tmp_path).get("prompts", [])
  assert stopped == whole["prompts"][: len(stopped)] and len(stopped) < 3

  # Its second shard is on disk, but not in the index.
  missing = len(whole["prompts"]) - len(stopped)
  place = ("train.corpus_writer:CorpusWriter._write_index", missing + 2)
  killed = run("train.synthesize", *arguments, cache=compiled, kill_at=place)
  assert killed.returncode == -9
  assert index(tmp_path)["shards"] == whole["shards"][:1]
  assert (tmp_path / "shard-00001.safetensors").exists()

  result = run("train.synthesize", *arguments, cache=compiled)
  assert result.returncode == 0, result.stderr
  assert contents(tmp_path) == contents(output)


def test_the_index_counts_what_was_dropped_and_why(output):
  totals = index(output)["totals"]
  written, merged, answered = (
    totals[name] for name in ("self_written", "merged", "answered")
  )
  assert written["drawn"] == 24
  assert sum(written.values()) == 2 * 24  # each is drawn, and kept or dropped
  assert merged["prompts"] == QUESTIONS + written["kept"]
  assert merged["duplicates"] == 1
  assert answered["prompts"] == merged["prompts"] - merged["duplicates"]
  assert answered["over_long"] == 1
  dropped = sum(answered[k] for k in ("over_long", "empty", "never_ending"))
  assert answered["kept"] == answered["prompts"] - dropped
  corpus = Corpus([str(output)])
  assert len(corpus) == answered["kept"]
  supervised = sum(corpus.example(i)[1].sum() for i in range(len(corpus)))
  assert supervised == answered["answer_tokens"]


def test_answers_are_the_targets_own_in_its_chat_template(output):
  config = get_config()
  model = load(config)
  corpus = Corpus([str(output)])
  texts, prompts, answers = [], [], []
  for i in range(len(corpus)):
    tokens, mask = corpus.example(i)
    text = model.tokenizer.decode(tokens[~mask].tolist(), skip_special=False)
    if "Question" in text or "First" in text:
      texts.append(text)
      prompts.append(tokens[~mask].tolist())
      answers.append(tokens[mask].tolist())
  assert len(texts) > 10
  template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
  assert template.format("Question 4?") in texts
  assert template.format("First turn") in texts
  assert greedy_answers(model, prompts, 24) == answers


def test_held_out_prompts_are_set_aside_by_source(output):
  share = get_config().synthesis.held_out
  files = {path.name for path in output.glob("held_out-*")}
  assert files == {"held_out-asked.jsonl", "held_out-self.jsonl"}
  lines = (output / "held_out-asked.jsonl").read_text().splitlines()
  asked = [json.loads(line)["prompt"] for line in lines]
  assert asked == [p for p in asked if is_held_out(p, share)]
  corpus = Corpus([str(output)])
  assert len(corpus.held_out) >= len(asked) - 1  # one may be too long
  assert 0 < len(corpus.held_out) < len(corpus) / 2


def test_a_complete_corpus_is_left_alone(questions, output):
  before = contents(output)
  synthesize(configured(questions, output))
  assert contents(output) == before


# --- Settings -----------------------------------------------------------------


def configured(questions, output, **overrides) -> Config:
  """The config that `command` describes."""
  config = get_config()
  settings = {
    "prompts": (str(questions),),
    "output": str(output),
    "num_self_prompts": 24,
    "prompt_tokens": 40,
    "max_answer_tokens": 24,
    "batch_size": 8,
    "shard_sequences": 8,
    "answer_temperature": 0.0,
    "dtype": "float32",
  }
  synthesis = dataclasses.replace(config.synthesis, **settings | overrides)
  return dataclasses.replace(config, synthesis=synthesis)


def test_other_settings_prompts_or_target_are_refused(
  questions, output, tmp_path
):
  with pytest.raises(CorpusError, match="prompt_tokens: 40, now 41"):
    synthesize(configured(questions, output, prompt_tokens=41))
  other = write_questions(tmp_path / "asked.jsonl")
  synthesize(configured(other, output))  # the same prompts elsewhere
  other.write_text(other.read_text() + '{"prompt": "one more"}\n')
  with pytest.raises(CorpusError, match="prompts: "):
    synthesize(configured(other, output))
  config = configured(questions, output)
  config.target = dataclasses.replace(config.target, seed=1)
  with pytest.raises(CorpusError, match="target: "):
    synthesize(config)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"output": ""}, "synthesis.output is empty"),
    ({"prompts": (), "num_self_prompts": 0}, "nothing to answer"),
    ({"openings": ()}, "synthesis.openings is empty"),
    ({"batch_size": 0}, "synthesis.batch_size=0"),
    ({"shard_sequences": -1}, "synthesis.shard_sequences=-1"),
    ({"prompts": ("a/x.jsonl", "b/x.jsonl")}, "named 'x'"),
    ({"prompts": ("a/self.jsonl",)}, "named 'self'"),
  ],
)
def test_settings_that_cannot_be_are_named(
  questions, tmp_path, overrides, message
):
  config = configured(questions, tmp_path / "out")
  for name, value in overrides.items():
    setattr(config.synthesis, name, value)
  with pytest.raises(ConfigError, match=message):
    synthesize(config)
  assert not (tmp_path / "out").exists()


def test_a_malformed_prompt_file_is_named_by_line(tmp_path):
  path = tmp_path / "bad.jsonl"
  path.write_text('{"prompt": "fine"}\n{"prompt": \n')
  with pytest.raises(PromptError, match=r"bad\.jsonl, line 2"):
    synthesize(configured(path, tmp_path / "out"))
  with pytest.raises(PromptError, match="does not exist"):
    synthesize(configured(tmp_path / "none.jsonl", tmp_path / "out"))
  assert not (tmp_path / "out").exists()


def test_every_reply_draws_from_a_noise_stream_of_its_own(
  questions, tmp_path, monkeypatch
):
  seeds = []

  def decode(model, sampling, prompts, max_new_tokens, seed):
    seeds.extend(range(seed, seed + len(prompts)))
    stop = model.stop_ids[0]
    reply = Completion("same", [30] * 9 + [stop], [], 1, 1, 1, [], 3, 1, 1, 1)
    return [reply] * len(prompts)

  monkeypatch.setattr(synthesis, "_decode", decode)
  synthesize(configured(questions, tmp_path / "out"))
  totals = index(tmp_path / "out")["totals"]
  assert totals["self_written"]["duplicates"] == 23
  assert len(seeds) == 24 + totals["answered"]["kept"]
  assert len(set(seeds)) == len(seeds)


# --- Parts --------------------------------------------------------------------


def test_sources_are_mixed_evenly_without_repeats():
  long = [f"a{i}" for i in range(6)]
  short = ["b0", "a1 ", "b2"]
  merged = interleave([long, short])
  assert merged == ["a0", "b0", "a1", "a2", "a3", "a4", "b2", "a5"]
  assert sorted(merged) == sorted({*long, "b0", "b2"})
  assert interleave([[], ["x"]]) == ["x"]


def test_loops_are_answers_that_never_end_and_repeat():
  noise = np.random.default_rng(0).integers(0, 99, 200).tolist()
  phrase = [4, 8, 15]
  assert is_loop([*noise, *phrase * 22], stop_ids=(7,))
  assert is_loop([*noise, *[3] * 64], stop_ids=(7,))
  assert not is_loop([*noise, *phrase * 22, 7], stop_ids=(7,))  # it ended
  assert not is_loop(noise, stop_ids=())
  assert not is_loop([*noise, *phrase * 15], stop_ids=())  # too short to tell
  assert not is_loop([3] * 63, stop_ids=())
