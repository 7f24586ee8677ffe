"""One run on 1 device, on 8, and on 2 processes of 4: the same, and resumable.

The devices are those that XLA makes of a CPU, the processes meet over loopback.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from dflash_jax.config import ConfigError, TrainConfig
from tests.train.legs import SAVED, STEPS, Leg
from tests.train.programs import ROOT, TIMEOUT
from train import mesh as mesh_lib
from train import processes

TOLERANCE = 1e-5  # of losses, float32, sums in another order


def free_port() -> int:
  """A port that nobody listens on."""
  with contextlib.closing(socket.socket()) as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start(
  cache: pathlib.Path, devices: int, module: str, *arguments: str
) -> subprocess.Popen[str]:
  """`python -m module` with so many devices; compiled code is kept."""
  return subprocess.Popen(
    [sys.executable, "-m", module, *arguments],
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
      "--xla_backend_optimization_level=0",  # half the time to compile
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(
  running: list[subprocess.Popen[str]],
) -> list[subprocess.CompletedProcess[str]]:
  """Waits for all; none is left behind."""
  try:
    ends = [process.communicate(timeout=TIMEOUT) for process in running]
  finally:
    for process in running:
      process.kill()
  return [
    subprocess.CompletedProcess(process.args, process.returncode, *end)
    for process, end in zip(running, ends, strict=True)
  ]


def train_legs(
  cache: pathlib.Path, corpus: str, legs: list[Leg], num_processes: int = 1
) -> list[dict[str, Any]]:
  """What legs on 8 devices, of so many processes, say for themselves.

  Every process must say the same.
  """
  told = json.dumps([dataclasses.asdict(leg) for leg in legs])
  others: list[list[str]] = [[]]
  if num_processes > 1:
    place = f"127.0.0.1:{free_port()}"
    others = [[place, str(num_processes), str(i)] for i in range(num_processes)]
  ends = finish(
    [
      start(cache, 8 // num_processes, "tests.train.legs", corpus, told, *other)
      for other in others
    ]
  )
  said = []
  for end in ends:
    assert end.returncode == 0, end.stderr
    lines = end.stdout.splitlines()
    said.append([json.loads(line) for line in lines if line.startswith("{")])
  assert all(other == said[0] for other in said)
  return said[0]


# --- The same run -------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, str]:
  """Where runs of each kind save."""
  path = tmp_path_factory.mktemp("saved")
  return {name: str(path / name) for name in ("one", "eight", "two")}


@pytest.fixture(scope="module")
def two(compiled, corpus_directory, saved) -> dict[str, dict[str, Any]]:
  """Two processes of four devices: data 4, fsdp 2."""
  legs = [Leg("two", fsdp=2, save=saved["two"])]
  told = train_legs(compiled, corpus_directory, legs, num_processes=2)
  return {leg["name"]: leg for leg in told}


@pytest.fixture(scope="module")
def told(compiled, corpus_directory, saved, two) -> dict[str, dict[str, Any]]:
  """One device, and eight: data 2, fsdp 4; each goes on from another."""
  legs = [
    Leg("one", save=saved["one"]),
    Leg("eight", fsdp=4, save=saved["eight"]),
    Leg("one after two", load=saved["two"]),
    Leg("eight after one", fsdp=4, load=saved["one"]),
  ]
  told = train_legs(compiled, corpus_directory, legs)
  return two | {leg["name"]: leg for leg in told}


def same(first: dict[str, Any], other: dict[str, Any]) -> None:
  """Asserts that two legs tell of one run, as far as they overlap."""
  count = min(len(first["losses"]), len(other["losses"]))
  assert count >= STEPS - SAVED
  np.testing.assert_allclose(
    first["losses"][-count:], other["losses"][-count:], atol=TOLERANCE, rtol=0
  )
  assert first["right"] == other["right"]
  assert first["loss"] == pytest.approx(other["loss"], abs=TOLERANCE)
  assert first["norm"] == pytest.approx(other["norm"], rel=1e-3)
  assert first["checksums"] == other["checksums"]


def test_a_run_is_the_same_on_any_devices(told):
  assert len(told["one"]["losses"]) == STEPS
  assert told["one"]["losses"][-1] < told["one"]["losses"][0] - 100 * TOLERANCE
  for name in ("eight", "two"):
    same(told["one"], told[name])


@pytest.mark.parametrize("name", ["one after two", "eight after one"])
def test_a_checkpoint_is_gone_on_from_on_other_devices(told, name):
  assert len(told[name]["losses"]) == STEPS - SAVED
  same(told["one"], told[name])


@pytest.mark.slow
def test_every_part_is_the_same_on_any_devices(compiled, corpus_directory):
  """Also Muon, whose products need whole matrices."""
  settings = {
    "loss": "0.3*ce + lk + e2e + confidence",
    "accumulate": 2,
    "ema": 0.75,
    "optimizer": "muon",
    "clip_norm": 0.1,
  }
  legs = [
    Leg("one", is_rich=True, settings=settings),
    Leg("data", fsdp=1, is_rich=True, settings=settings),
    Leg("fsdp", fsdp=8, is_rich=True, settings=settings),
  ]
  one, *others = train_legs(compiled, corpus_directory, legs)
  for other in others:
    same(one, other)


def test_a_device_holds_its_share_of_the_state(told):
  """Masters, average and moments; what no axis of fsdp divides stays whole."""
  assert told["one"]["share"] == 1
  assert told["eight"]["share"] < 0.3
  assert told["two"]["share"] < 0.55


@pytest.mark.slow
def test_any_checkpoint_is_gone_on_from_on_any_devices(
  compiled, corpus_directory, saved, told
):
  legs = [
    Leg("one after eight", load=saved["eight"]),
    Leg("eight after two", fsdp=4, load=saved["two"]),
  ]
  ends = train_legs(compiled, corpus_directory, legs)
  legs = [
    Leg("two after one", fsdp=2, load=saved["one"]),
    Leg("two after eight", fsdp=8, load=saved["eight"]),
  ]
  ends += train_legs(compiled, corpus_directory, legs, num_processes=2)
  for leg in ends:
    assert len(leg["losses"]) == STEPS - SAVED
    same(told["one"], leg)


# --- The program --------------------------------------------------------------


def arguments(corpus: str, workdir: pathlib.Path, *more: str) -> list[str]:
  return [
    "--config=configs/tiny.py",
    f"--config.train.corpus=('{corpus}',)",
    "--config.train.batch_size=8",
    "--config.train.steps=12",
    "--config.train.checkpoint_every=6",
    "--config.train.log_every=2",
    "--config.train.sequence_length=48",
    "--config.train.compute_dtype=float32",
    f"--workdir={workdir}",
    *more,
  ]


def run_main(
  cache: pathlib.Path, devices: int, *commands: list[str]
) -> list[subprocess.CompletedProcess[str]]:
  """train.main in as many processes as there are commands."""
  if len(commands) > 1:
    place = f"--coordinator=127.0.0.1:{free_port()}"
    count = f"--processes={len(commands)}"
    commands = tuple(
      [*command, place, count, f"--process={number}"]
      for number, command in enumerate(commands)
    )
  return finish(
    [start(cache, devices, "train.main", *command) for command in commands]
  )


def losses(workdir: pathlib.Path) -> list[tuple[str, int, float]]:
  """Every loss that was logged."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return [(r["kind"], r["step"], r["loss"]) for r in records if "loss" in r]


@pytest.mark.slow
def test_the_program_trains_and_goes_on_on_any_devices(
  compiled, corpus_directory, tmp_path
):
  one, mixed = tmp_path / "one", tmp_path / "mixed"
  (end,) = run_main(compiled, 1, arguments(corpus_directory, one))
  assert end.returncode == 0, end.stderr
  half = arguments(corpus_directory, mixed)
  killed = [*half, "--config.train.fsdp=2"]
  ends = run_main(compiled, 4, killed, killed)
  for end in ends:
    assert end.returncode == 0, end.stderr
  assert "slots/s" in ends[0].stderr and "slots/s" not in ends[1].stderr
  assert "held-out tau" not in ends[1].stdout
  latest = max((mixed / "checkpoints").iterdir(), key=lambda p: int(p.name))
  assert latest.name == "12"
  for path in sorted(latest.rglob("*"), reverse=True):
    path.rmdir() if path.is_dir() else path.unlink()
  latest.rmdir()
  (end,) = run_main(compiled, 8, [*half, "--resume"])
  assert end.returncode == 0, end.stderr
  for (*place, loss), (*other, expected) in zip(
    losses(mixed), losses(one), strict=True
  ):
    assert place == other
    assert loss == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.slow
def test_processes_that_differ_or_diverge_all_end(
  compiled, corpus_directory, tmp_path
):
  told = arguments(corpus_directory, tmp_path)
  ends = run_main(compiled, 4, told, [*told, "--config.train.seed=3"])
  for end in ends:
    assert end.returncode == 2, end.stderr
    assert "processes [1] were started with other --config" in end.stderr
  wild = [*told, "--config.train.learning_rate=1e30"]
  for end in run_main(compiled, 4, wild, wild):
    assert end.returncode == 2, end.stderr
    assert "lower train.learning_rate" in end.stderr


# --- Refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"fsdp": 3}, r"data=2 x train.fsdp=3 is 6 devices, and there are 8; use"),
    ({"data": 2, "fsdp": 2}, "data=2 x train.fsdp=2 is 4 devices, .* are 8"),
    ({"fsdp": 16}, "data=0 x train.fsdp=16 is 0 devices"),
    ({"batch_size": 12}, "batch_size=12 cannot be split among 8 devices"),
    ({"accumulate": 2}, "accumulate=2 pieces each; use a multiple of 16"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(monkeypatch, settings, message):
  monkeypatch.setattr(jax, "device_count", lambda: 8)
  config = TrainConfig(**{"batch_size": 8} | settings)
  with pytest.raises(ConfigError, match=message):
    mesh_lib.make_mesh(config)


def test_one_device_needs_no_mesh():
  assert mesh_lib.make_mesh(TrainConfig(batch_size=3)) is None


@pytest.mark.parametrize(
  ("place", "process", "count", "message"),
  [
    ("", 1, 2, "--process=1 --processes=2 need --coordinator=HOST:PORT"),
    ("here:1", None, 2, "needs --process=I and --processes=N"),
    ("here:1", 2, 2, "--process=2 of --processes=2 .* number them 0 to 1"),
    ("here:1", 0, 0, "--process=0 of --processes=0 is impossible"),
    ("here", 0, 2, "--coordinator=here is no address"),
    ("cluster", 0, 2, "leave them out"),
    ("cluster", None, None, "cannot meet other processes at the cluster"),
  ],
)
def test_processes_that_cannot_meet_are_told_why(
  place, process, count, message
):
  with pytest.raises(ConfigError, match=message):
    processes.join(place, process, count)


def test_a_process_whose_others_do_not_come_gives_up(monkeypatch):
  monkeypatch.setattr(processes, "MEETING", 1)
  with pytest.raises(ConfigError, match="process=1 found nobody at .* in 1 s"):
    processes.join(f"127.0.0.1:{free_port()}", 1, 2)
