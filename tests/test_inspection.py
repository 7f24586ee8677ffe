"""Inspection: what a checkpoint is, and what is wrong with it, by name."""

import copy
import io
import json
import os
import pathlib
import pickle
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dflash_jax import weights
from dflash_jax.inspect import inspect_all
from dflash_jax.inspection import inspect
from dflash_jax.inspection.values import scan
from dflash_jax.weights.safetensors_file import (
  read_safetensors,
  write_safetensors,
)
from tests import damages
from tests.commands import ROOT, run_each
from tests.damages import CONFIG, DAMAGES, KEY, WEIGHTS, Damage

GOLDENS = pathlib.Path(__file__).parent / "goldens"
SOUND = sorted(
  {
    str(file.parent)
    for folder in ("drafter", "heads", "eagle3", "targets")
    for file in (GOLDENS / folder).rglob("model*.safetensors")
  }
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, pathlib.Path]:
  """A sound checkpoint of each kind."""
  place = tmp_path_factory.mktemp("sound")
  for kind, save in damages.SAVE.items():
    save(place / kind)
  return {kind: place / kind for kind in damages.SAVE}


@pytest.fixture
def damaged(sound, tmp_path):
  """Gives a damaged copy."""

  def make(damage: Damage, name="copy") -> str:
    place = tmp_path / name
    shutil.copytree(sound[damage.kind], place, symlinks=True)
    damage.do(place)
    return damages.source_of(place)

  return make


# --- Sound checkpoints --------------------------------------------------------


@pytest.mark.parametrize(
  "path", [*SOUND, str(ROOT / "checkpoints/smollm2_135m")]
)
def test_a_sound_checkpoint_has_no_problems(path):
  report = inspect(path)
  assert report.problems == [] and report.kind != "unknown"


@pytest.mark.parametrize("kind", damages.SAVE)
def test_every_kind_is_known_and_sound(sound, kind):
  report = inspect(damages.source_of(sound[kind]))
  assert report.problems == []
  titles = {
    "dflash": "DFlash drafter",
    "dflash2": "DFlash 2 drafter",
    "dspark": "DSpark drafter",
    "domino": "Domino drafter",
    "fp8": "DFlash drafter",
    "eagle3": "EAGLE-3 drafter",
    "target": "language model of family Llama",
    "tied": "language model of family Qwen2",
    "sharded": "language model of family Llama",
    "gguf": "language model of family Llama",
  }
  assert report.title.startswith(titles[kind])
  damages.load(damages.source_of(sound[kind]))


def test_a_drafter_is_described(sound):
  facts = inspect(sound["dflash2"]).facts
  stored = safetensors.numpy.load_file(sound["dflash2"] / WEIGHTS)
  assert facts["parameters"] == sum(x.size for x in stored.values())
  assert facts["weight bytes"] == sum(x.nbytes for x in stored.values())
  assert facts["by dtype"] == {"F32": facts["parameters"]}
  assert facts["block"] == {"slots": 5, "drafts": 4, "anchor drafts": False}
  assert facts["taps"] == [0, 3, 2]
  assert facts["mask token"] == 52
  assert facts["draft vocabulary"] == 5
  assert facts["fits a target"] == {
    "layers": 5,
    "width": 24,
    "vocabulary": 53,
    "rotary base": 1000.0,
  }


def test_numbers_are_looked_at_in_every_dtype(tmp_path):
  largest = {"float16": 65504, "bfloat16": 3e38, "float32": 3e38}
  arrays = {}
  for dtype, most in (largest | {"float64": 1e308}).items():
    for value in (np.nan, -np.inf, most, -most, -0.0):
      arrays[f"{dtype} {value}"] = np.array([0, value, 1], jnp.dtype(dtype))
    arrays[f"{dtype} zero"] = np.array([0, -0.0], jnp.dtype(dtype))
  with (tmp_path / "file").open("wb") as file:
    write_safetensors(file, arrays)
  for name, tensor in read_safetensors(tmp_path / "file").items():
    values = scan(tensor)
    assert values is not None
    assert values.not_finite == np.sum(~np.isfinite(arrays[name])), name
    assert values.is_zero == ("zero" in name)


def test_pieces_of_a_tensor_are_all_looked_at(tmp_path, monkeypatch):
  monkeypatch.setattr("dflash_jax.inspection.values._PIECE", 7)
  array = np.zeros(23, np.float32)
  array[[0, 13, 22]] = np.nan, np.inf, 3
  safetensors.numpy.save_file({"a": array, "b": array[1:8]}, tmp_path / "file")
  tensors = read_safetensors(tmp_path / "file")
  assert scan(tensors["a"]).not_finite == 2
  assert not scan(tensors["a"]).is_zero and scan(tensors["b"]).is_zero


def test_a_layout_is_told_by_its_owner():
  layouts = {
    "eagle3/speculators": "speculators",
    "eagle3/flat": "EAGLE-3's release",
    "drafter/plain": "the DFlash release",
    "targets/qwen3": "transformers",
  }
  for path, owner in layouts.items():
    assert owner in inspect(GOLDENS / path).facts["layout"]


# --- Damaged ones -------------------------------------------------------------


def test_there_are_enough_damages():
  assert len(DAMAGES) >= 50


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_named(damaged, name):
  damage = DAMAGES[name]
  source = damaged(damage)
  report = inspect(source)
  told = [
    problem
    for problem in report.problems
    if all(word in problem for word in damage.words)
  ]
  assert told, report.problems
  assert not any("not readable, " in x for x in report.problems)  # foreseen
  out = io.StringIO()
  assert not inspect_all([source], None, False, out)  # exit status 1
  assert told[0] in out.getvalue()


@pytest.mark.parametrize("name", DAMAGES)
def test_the_loader_says_so_too(damaged, name):
  damage = DAMAGES[name]
  source = damaged(damage)
  if damage.loads:
    damages.load(source)
    return
  with pytest.raises(weights.WeightsError) as caught:
    damages.load(source)
  assert str(caught.value).count("\n") == 0


def test_every_problem_is_told_and_not_only_the_first(damaged):
  damage = damages.both(
    damages.tensor(KEY, lambda _: None),
    damages.tensor("norm.weight", lambda x: x[:5]),
    damages.tensor("layers.0.mlp.up_proj.weight", lambda x: x.astype("f8")),
    damages.tensor("layers.0.mlp.down_proj.weight", lambda x: np.nan * x),
    damages.tensor("fc.weight", lambda _: None),
    damages.tensor("spare", lambda _: np.ones(3, "f4")),
    damages.setting(
      attention_bias=True, rms_norm_eps=-1, max_position_embeddings="absent"
    ),
    damages.setting(nested=True, mask_token_id=99, block_size=1),
    damages.put("draft_vocabulary.safetensors", b"x"),
  )
  report = inspect(damaged(Damage("dflash", damage, ())))
  told = "\n".join(report.problems)
  for words in (
    f"{KEY} is missing",
    "norm.weight has shape (5,)",
    "up_proj.weight is stored as F64",
    "down_proj.weight holds 816 numbers",
    "fc.weight",
    "spare",
    "attention_bias=True",
    "rms_norm_eps is -1",
    "max_position_embeddings is missing",
    "mask_token_id=99",
    "block_size=1",
  ):
    assert told.count(words) == 1, (words, told)
  assert len(report.problems) == 11, told


def test_a_setting_at_fault_makes_no_other_problems(damaged):
  for key in ("hidden_size", "num_hidden_layers", "vocab_size", "head_dim"):
    damage = Damage("dflash2", damages.setting(**{key: "?"}), ())
    report = inspect(damaged(damage, key))
    assert len(report.problems) == 1, report.problems
    assert f"{key} is '?'" in report.problems[0]
    assert any("were not compared" in note for note in report.notes)


def test_numbers_are_looked_at_whatever_the_settings(damaged):
  damage = damages.both(
    damages.setting(hidden_size="?"), damages.tensor(KEY, lambda x: np.nan * x)
  )
  report = inspect(damaged(Damage("dflash", damage, ())))
  assert [KEY in problem for problem in report.problems] == [False, True]


def test_each_missing_tensor_is_named(damaged):
  def empty(directory):
    safetensors.numpy.save_file({}, directory / WEIGHTS)

  report = inspect(damaged(Damage("target", empty, ())))
  expected = safetensors.numpy.load_file(
    pathlib.Path(damaged(Damage("target", lambda _: None, ()), "whole"))
    / WEIGHTS
  )
  for name in expected:
    assert sum(f"tensor {name} is" in x for x in report.problems) == 1


def test_names_cannot_forge_a_line_or_steer_a_terminal(damaged):
  name = "x\n  problem: none\x1b[2J\ud800"
  damage = damages.header(
    lambda table: table | {name: {"dtype": "F32", "shape": 3}}
  )
  report = inspect(damaged(Damage("dflash", damage, ())))
  text = report.to_text()
  assert "x\\n  problem: none\\x1b[2J\\ud800" in text
  text.encode()
  json.dumps(report.to_json()).encode()


# --- Nothing is run -----------------------------------------------------------


class _Marks:
  """Leaves a file behind when it is unpickled."""

  def __init__(self, marker):
    self.marker = marker

  def __reduce__(self):
    return pathlib.Path.touch, (self.marker,)


def test_no_code_of_a_checkpoint_is_run(damaged, tmp_path):
  marker = tmp_path / "marker"
  code = f"open({str(marker)!r}, 'w')".encode()
  files = ("dflash.py", "modeling.py", "config.py", "__init__.py", "eagle3.py")
  pickles = ("pytorch_model.bin", "model.pt", "training_args.bin")
  damage = damages.both(
    damages.setting(
      auto_map={"AutoModel": "modeling.Model", "AutoConfig": "config.Config"}
    ),
    *(damages.put(name, code) for name in files),
    *(damages.put(name, pickle.dumps(_Marks(marker))) for name in pickles),
  )
  kinds = ("dflash2", "eagle3", "target")
  sources = [damaged(Damage(kind, damage, ()), kind) for kind in kinds]
  for source in sources:
    report = inspect(source)
    assert report.is_sound, report.problems
    notes = "\n".join(report.notes)
    assert all(name in notes for name in ("dflash.py", "model.pt", "auto_map"))
    damages.load(source)
  assert inspect_all(sources, sources[2], True, io.StringIO())
  assert not marker.exists()
  pickle.loads(pickle.dumps(_Marks(marker)))  # the trap does work
  assert marker.exists()


def test_a_link_out_of_the_directory_is_named(damaged, tmp_path):
  def link(directory):
    (directory / CONFIG).rename(tmp_path / "elsewhere")
    (directory / CONFIG).symlink_to(tmp_path / "elsewhere")

  report = inspect(damaged(Damage("dflash", link, ())))
  assert report.is_sound
  assert any("config.json is a link out" in note for note in report.notes)


def test_links_of_the_hubs_cache_are_at_home(sound, tmp_path):
  blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
  blobs.mkdir()
  snapshot.mkdir(parents=True)
  for number, file in enumerate(sorted(sound["dflash"].iterdir())):
    shutil.copy(file, blobs / str(number))
    (snapshot / file.name).symlink_to(pathlib.Path("../../blobs") / str(number))
  report = inspect(snapshot)
  assert report.is_sound and not any("link" in note for note in report.notes)


# --- The target ---------------------------------------------------------------


def test_a_drafter_fits_its_target(sound):
  for kind in (
    "dflash",
    "dflash2",
    "dspark",
    "domino",
    "fp8",
    "eagle3",
    "tied",
  ):
    for target in ("target", "sharded", "gguf"):
      source = damages.source_of(sound[target])
      assert inspect(sound[kind], source).problems == []


@pytest.mark.parametrize(
  ("kind", "change", "words"),
  [
    ("dflash", {"num_hidden_layers": 6}, "target layers is 5 in the drafter"),
    ("dflash", {"hidden_size": 26}, "width of the target is 24"),
    ("dflash", {"vocab_size": 59}, "vocabulary is 53 in the drafter and 59"),
    ("dflash", {"rope_theta": 5.0}, "rotary base is 1000.0 in the drafter"),
    ("dflash", {"eos_token_id": 52}, "mask_token_id=52 is the tokenizer's eos"),
    ("dflash", {"pad_token_id": 52}, "mask_token_id=52 is the tokenizer's pad"),
    ("eagle3", {"num_hidden_layers": 3}, "tap 3 is outside"),
    ("eagle3", {"vocab_size": 59}, "vocabulary is 53"),
    ("tied", {"vocab_size": 59}, "vocabulary is 53 in the draft model"),
  ],
)
def test_what_does_not_fit_the_target_is_named(
  sound, damaged, kind, change, words
):
  target = damaged(Damage("target", damages.setting(**change), ()))
  problems = inspect(sound[kind], target).problems
  assert [words in problem for problem in problems].count(True) == 1, problems


def test_the_rotary_of_eagle3s_own_layer_is_its_own(sound, damaged):
  target = damaged(Damage("target", damages.setting(rope_theta=5.0), ()))
  report = inspect(sound["eagle3"], target)
  assert report.is_sound
  assert any("rotary base is 1000.0" in note for note in report.notes)


def test_the_tokenizers_own_words_for_tokens_count(sound, damaged):
  settings = {
    "pad_token": {"content": "<pad>"},
    "added_tokens_decoder": {"52": {"content": "<pad>"}, "x": 3},
  }
  damage = damages.put("tokenizer_config.json", json.dumps(settings).encode())
  target = damaged(Damage("target", damage, ()))
  (problem,) = inspect(sound["dflash"], target).problems
  assert "mask_token_id=52 is the tokenizer's pad token" in problem


# --- Fuzz ---------------------------------------------------------------------


FUZZED = {
  "dflash2": (WEIGHTS, CONFIG, damages.VOCABULARY),
  "eagle3": (WEIGHTS, CONFIG),
  "fp8": (WEIGHTS, CONFIG),
  "sharded": (damages.SHARDS[0], damages.INDEX, CONFIG),
  "gguf": ("model.gguf",),
}


def corrupt(data: bytes, rng: np.random.Generator) -> bytes:
  """A few bytes changed near the beginning, or the end cut off."""
  changed = bytearray(data)
  span = min(len(data), 2500)  # headers, and some numbers
  match rng.integers(4):
    case 0:
      return data[: rng.integers(len(data))]
    case 1:
      start = rng.integers(span)
      del changed[start : start + rng.integers(1, 9)]
    case 2:
      start = rng.integers(span)
      changed[start:start] = rng.bytes(rng.integers(1, 9))
    case _:
      for _ in range(rng.integers(1, 4)):
        place = rng.integers(span)
        # Digits for digits reach deeper than noise, which no JSON survives.
        is_digit = chr(changed[place]).isdigit()
        changed[place] = rng.integers(48, 58) if is_digit else rng.integers(256)
  return bytes(changed)


@pytest.mark.parametrize("kind", FUZZED)
def test_no_bytes_make_it_fail(sound, tmp_path, kind):
  rng = np.random.default_rng(11)
  place = tmp_path / "copy"
  shutil.copytree(sound[kind], place)
  found = 0
  for number in range(120):
    name = FUZZED[kind][number % len(FUZZED[kind])]
    whole = (place / name).read_bytes()
    (place / name).write_bytes(corrupt(whole, rng))
    source = damages.source_of(place)
    report = inspect(source)
    unforeseen = [x for x in report.problems if "not readable, " in x]
    assert not unforeseen
    try:
      damages.load(source)
    except weights.WeightsError:
      found += not report.is_sound
      assert not report.is_sound  # what cannot be loaded is told
    (place / name).write_bytes(whole)
  assert found > 40


ODD = (
  None, True, 0, -1, 1, 7, 10**9, 10**30, 10**400, 0.5, 1e308, float("nan"), "",
  "x", "\ud800", "float32", [], [1], ["x"], [[1]], {}, {"a": 1}, [0] * 99,
)  # fmt: skip


def places(value, found):
  """Every container in a JSON value, with its keys."""
  keys = list(value) if isinstance(value, dict) else range(len(value))
  for key in keys:
    found.append((value, key))
    if isinstance(value[key], dict | list):
      places(value[key], found)
  return found


@pytest.mark.parametrize("kind", ["dflash2", "dspark", "eagle3", "tied", "fp8"])
def test_no_settings_make_it_fail(sound, tmp_path, kind):
  rng = np.random.default_rng(23)
  place = tmp_path / "copy"
  shutil.copytree(sound[kind], place)
  whole = json.loads((place / CONFIG).read_text())
  found = 0
  for _ in range(80):
    values = json.loads(json.dumps(whole))
    for _ in range(rng.integers(1, 4)):
      spots = places(values, [])
      container, key = spots[rng.integers(len(spots))]
      container[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    (place / CONFIG).write_text(json.dumps(values))
    report = inspect(place)
    json.dumps(report.to_json(), allow_nan=False)
    assert not [x for x in report.problems if "not readable, " in x]
    try:
      damages.load(str(place))
    except weights.WeightsError:
      found += 1
      assert not report.is_sound
  assert found > 40


# --- The program --------------------------------------------------------------


def test_the_program_tells_by_its_exit_status(sound, damaged, tmp_path):
  bad = damaged(DAMAGES["tensor missing"])
  good = str(sound["dflash2"])
  target = str(sound["target"])
  runs = run_each(
    "dflash_jax.inspect",
    [
      [good, target, f"--target={target}"],
      [good, bad],
      ["--json", bad, good],
      [],
      [good, "--target=/nowhere"],
      ["/nowhere"],
    ],
  )
  assert [run.returncode for run in runs] == [0, 1, 1, 2, 2, 1]
  assert "DFlash 2 drafter, sound" in runs[0].stdout
  assert f"problem: tensor {KEY} is missing" in runs[1].stdout
  first, second = map(json.loads, runs[2].stdout.splitlines())
  assert (first["path"], first["sound"], second["sound"]) == (bad, False, True)
  assert second["facts"]["taps"] == [0, 3, 2]
  assert "no checkpoint is named" in runs[3].stderr
  assert "/nowhere" in runs[4].stderr and "/nowhere" in runs[5].stdout
  assert all("Traceback" not in run.stderr for run in runs)


def test_the_standard_library_keeps_its_inspect():
  import inspect as standard

  assert hasattr(standard, "signature")
  assert os.path.dirname(standard.__file__) != str(ROOT / "dflash_jax")
