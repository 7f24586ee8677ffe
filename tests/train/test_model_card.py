"""Model cards: numbers as measured, commands that count as engines do."""

import copy
import dataclasses
import json
import pathlib
import re

import pytest
from huggingface_hub.repocard import metadata_load

from configs.tiny import get_config
from dflash_jax import weights
from dflash_jax.drafters import DFlash
from dflash_jax.inspection import inspect
from dflash_jax.weights import WeightsError
from tests import damages
from tests.commands import ROOT, run_each
from tests.damages import SAVE
from tests.testing import random_params
from train.files import FileError
from train.model_card import read_results, write_card
from train.serving_commands import plan_serving

GSM8K = ROOT / "docs/results/default_drafter/gsm8k.json"
BLOCK = 5  # slots of the tiny block drafters


@pytest.fixture(scope="module")
def drafters(tmp_path_factory) -> dict[str, pathlib.Path]:
  """A drafter of each kind."""
  place = tmp_path_factory.mktemp("drafters")
  kinds = ("dflash", "dflash2", "dspark", "domino", "fp8", "eagle3", "tied")
  for kind in kinds:
    SAVE[kind](place / kind)
  return {kind: place / kind for kind in kinds}


def card(directory, results=(), **options) -> str:
  write_card(directory, results, **options)
  return (directory / "README.md").read_text()


def section(text: str, name: str) -> str:
  return re.split(r"^## ", text.partition(f"## {name}\n")[2], flags=re.M)[0]


def single_record() -> dict:
  """A record without a sweep, as eval.main writes it."""
  record = json.loads(GSM8K.read_text())
  point = record.pop("points")[1]
  del point["line"], point["settings"], point["decode"]
  return record | point | {"drafter_bytes": 3}


# --- Numbers ------------------------------------------------------------------


def test_numbers_are_those_of_the_records(drafters, tmp_path):
  record = single_record()
  record["tau_per_request"], record["speedup"] = 1.2345, 9.876
  record["config"]["decode"]["temperature"] = 0.7
  (tmp_path / "other.json").write_text(json.dumps(record))
  results = read_results([str(GSM8K), str(tmp_path / "other.json")])
  measured = section(card(drafters["dflash2"], results), "Measured")
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in measured.splitlines()
    if "greedy" in line
  ]
  points = json.loads(GSM8K.read_text())["points"]
  assert len(rows) == len(points) + 1 == 3
  for row, point in zip(rows, points, strict=False):
    assert row == [
      point["settings"]["width"],
      "0",
      "greedy",
      f"{point['tau_per_request']:.2f}",
      f"{point['tau_per_round']:.2f}",
      f"{point['width']:.1f}",
      f"{point['plain_tokens_per_s']:.1f}",
      f"{point['speculative_tokens_per_s']:.1f}",
      f"{point['speedup']:.2f}x",
      f"{point['identical_fraction']:.1%}",
    ]
  assert rows[2][:3] == ["0.7", "greedy", "1.23"] and "9.88x" in rows[2]
  for fact in (
    "gsm8k.json",
    "other.json",
    "20 prompts",
    "Intel(R) Xeon(R) Processor, 2 cores",
    "jax 0.11.2",
    "2026-11-26",
    "bonus token included",
    "`checkpoints/smollm2_135m`",
  ):
    assert fact in measured


def test_points_that_were_refused_are_left_out(drafters, tmp_path):
  record = json.loads(GSM8K.read_text())
  record["points"][0] = {"settings": {}, "decode": {}, "refused": "too wide"}
  (tmp_path / "r.json").write_text(json.dumps(record))
  text = card(drafters["dflash"], read_results([str(tmp_path / "r.json")]))
  assert section(text, "Measured").count("greedy") == 1


def test_without_results_the_card_says_so_and_has_no_numbers(drafters):
  measured = section(card(drafters["dflash2"]), "Measured")
  assert "Nothing was measured" in measured
  assert "python -m eval.main" in measured
  assert not re.search(r"\d", measured)


def test_what_it_is_comes_from_the_files(drafters):
  text = section(card(drafters["dflash2"]), "What it is")
  stored = (drafters["dflash2"] / "model.safetensors").stat().st_size
  size = int(re.search(r"weights \| ([\d,]+)", text)[1].replace(",", ""))
  assert stored - 8000 < size < stored
  assert "5 slots, 4 drafts; the anchor drafts nothing" in text
  assert "outputs of layers 0, 3, 2" in text
  assert "draft vocabulary | 5 tokens" in text
  assert "not recorded" in text  # the target


def test_training_facts_are_those_of_the_run(tmp_path):
  config = damages.block_drafter("dflash")
  params = random_params(DFlash(config), seed=1)
  facts = {
    "run": "mine",
    "target": "someone/model-7b",
    "step": 1234,
    "held_out_tau": 2.71828,
  }
  weights.save_drafter(tmp_path / "d", config, params, extra=facts)
  run = get_config()
  run.train = dataclasses.replace(
    run.train, steps=5678, batch_size=13, loss="ce + selector", optimizer="muon"
  )
  training = section(card(tmp_path / "d", config=run), "Training")
  for fact in ("mine", "1,234", "2.718", "5,678", "13 rows", "muon"):
    assert fact in training
  assert "`ce + selector`" in training
  without = section(card(tmp_path / "d"), "Training")
  assert "2.718" in without and "5,678" not in without
  data = metadata_load(tmp_path / "d" / "README.md")
  assert data["base_model"] == "someone/model-7b"
  assert "vllm serve someone/model-7b" in (tmp_path / "d/README.md").read_text()


# --- Commands -----------------------------------------------------------------


def commands(kind: str, drafters, chain=7) -> dict[str, str]:
  network = inspect(drafters[kind]).network
  assert network is not None
  servings = plan_serving(network, "T", "D", chain)
  return {serving.engine: serving.command for serving in servings}


def test_commands_count_as_each_engine_does(drafters):
  for kind in ("dflash", "dflash2", "fp8"):
    found = commands(kind, drafters)
    method, counts = vllm(found)
    assert (method, counts) == ("dflash", BLOCK - 1)
    assert f"num-draft-tokens {BLOCK}" in found["SGLang"]
    assert "speculative-algorithm DFLASH" in found["SGLang"]
    assert found["transformers"].count("dflash generate transformers") == 1
  trt = commands("dflash", drafters)["TensorRT-LLM"]
  assert "decoding_type: DFlash\n" in trt
  assert f"max_draft_len: {BLOCK - 1}\n" in trt


def test_a_dspark_block_drafts_from_its_anchor_on(drafters):
  found = commands("dspark", drafters)
  assert vllm(found) == ("dspark", BLOCK)
  assert "speculative-algorithm DSPARK" in found["SGLang"]
  assert f"speculative-dspark-block-size {BLOCK}" in found["SGLang"]
  assert "decoding_type: DSpark\n" in found["TensorRT-LLM"]
  assert f"max_draft_len: {BLOCK}\n" in found["TensorRT-LLM"]
  assert found["transformers"] == ""


def test_chains_are_as_long_as_they_were_trained(drafters):
  found = commands("eagle3", drafters, chain=3)
  assert vllm(found) == ("eagle3", 3)
  assert "--speculative-algorithm EAGLE3" in found["SGLang"]
  assert "--speculative-num-steps 3" in found["SGLang"]
  assert "--speculative-num-draft-tokens 4" in found["SGLang"]
  assert "decoding_type: Eagle3\n" in found["TensorRT-LLM"]
  assert "max_draft_len: 3\n" in found["TensorRT-LLM"]
  found = commands("tied", drafters, chain=6)
  assert vllm(found) == ("draft_model", 6)
  assert "STANDALONE" in found["SGLang"]
  assert "--speculative-num-draft-tokens 7" in found["SGLang"]
  assert "decoding_type: DraftTarget\n" in found["TensorRT-LLM"]
  assert "num_assistant_tokens = 6" in found["transformers"]
  compile(found["transformers"], "snippet", "exec")


def test_engines_that_cannot_serve_a_kind_get_no_command(drafters):
  assert {e for e, c in commands("domino", drafters).items() if not c} == {
    "vLLM",
    "TensorRT-LLM",
    "transformers",
  }
  assert {e for e, c in commands("dflash2", drafters).items() if not c} == {
    "TensorRT-LLM"
  }
  mixed = dataclasses.replace(
    damages.block_drafter("dflash"), anchor_predicts=True
  )
  late = dataclasses.replace(
    damages.block_drafter("dspark"), anchor_predicts=False
  )
  for network in (mixed, late):
    servings = plan_serving(network, "T", "D", 7)
    assert len(servings) == 4 and not any(s.command for s in servings)
    assert all(s.note for s in servings)


def vllm(found: dict[str, str]) -> tuple[str, int]:
  """Method and count of the one command that holds JSON."""
  config = json.loads(re.search(r"'(\{.*\})'", found["vLLM"])[1])
  assert config["model"] == "D"
  return config["method"], config["num_speculative_tokens"]


@pytest.mark.parametrize(
  "kind", ["dflash", "dflash2", "dspark", "domino", "fp8", "eagle3", "tied"]
)
def test_every_kind_has_a_card_that_says_what_was_not_run(drafters, kind):
  text = card(drafters[kind], license_id="apache-2.0")
  data = metadata_load(drafters[kind] / "README.md")
  assert data["license"] == "apache-2.0"
  assert "speculative-decoding" in data["tags"]
  assert "base_model" not in data  # none was recorded
  serving = section(text, "Serving")
  assert "None of these commands was run" in serving
  assert "`TARGET` stands for the model it was made for" in serving
  for engine in ("vLLM", "SGLang", "TensorRT-LLM", "transformers"):
    assert f"### {engine}\n" in serving
  assert ("#51581" in serving) == (kind == "fp8")
  # Nothing that reads the drafter minds the card.
  weights.drafter_kind(str(drafters[kind]))
  damages.load(str(drafters[kind]))


# --- What is refused ----------------------------------------------------------


@pytest.mark.parametrize(
  ("damage", "words"),
  [
    (lambda record: record.pop("machine"), "machine is missing"),
    (lambda record: record.pop("speedup"), "speedup is missing"),
    (lambda record: record.update(points=3), "points is missing"),
    (lambda record: record.update(points=[3]), "points is missing"),
  ],
)
def test_a_file_that_is_no_record_is_named(tmp_path, damage, words):
  record = copy.deepcopy(single_record())
  damage(record)
  path = tmp_path / "r.json"
  path.write_text(json.dumps(record))
  with pytest.raises(FileError, match=rf"r\.json is no record .*{words}"):
    read_results([str(path)])


def test_an_unsound_drafter_gets_no_card(tmp_path):
  SAVE["dflash"](tmp_path / "d")
  damages.DAMAGES["NaN"].do(tmp_path / "d")
  with pytest.raises(
    WeightsError, match="no card for an unsound drafter: .*NaN"
  ):
    write_card(tmp_path / "d")
  assert not (tmp_path / "d" / "README.md").exists()


def test_a_card_is_replaced_only_if_it_was_made(tmp_path):
  SAVE["dflash"](tmp_path / "d")
  card(tmp_path / "d")
  SAVE["dflash"](tmp_path / "d")  # an earlier export, card and all, may go
  assert not (tmp_path / "d" / "README.md").exists()
  (tmp_path / "d" / "README.md").write_text("# mine")
  with pytest.raises(WeightsError, match=r"README\.md"):
    SAVE["dflash"](tmp_path / "d")
  assert (tmp_path / "d" / "README.md").read_text() == "# mine"


def test_the_program_writes_a_card(drafters, tmp_path):
  source = f"--drafter={drafters['eagle3']}"
  output = f"--output={tmp_path / 'out'}"
  runs = run_each(
    "train.export",
    [
      [source, output, "--model_card", f"--results={GSM8K}"],
      [source, output, f"--results={GSM8K}"],
      [source, output, "--model_card", "--results=/nowhere.json"],
    ],
  )
  assert [run.returncode for run in runs] == [0, 2, 2], runs[0].stderr
  text = (tmp_path / "out" / "README.md").read_text()
  assert "An EAGLE-3 drafter" in text and "2.95" in text
  assert "add that" in runs[1].stderr and "/nowhere.json" in runs[2].stderr
