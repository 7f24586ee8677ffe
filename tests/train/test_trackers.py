"""What is logged reaches every tracker, and can be read back there."""

import json
import pathlib
import struct
import sys
import types

import jax
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from configs.tiny import get_config
from dflash_jax.config import ConfigError
from train.trackers import check_trackers, flatten, open_trackers

RECORD = {"loss": 2.5, "accuracy": [0.5, 0.25], "slots": 31, "text": "Hi!"}


def configured(*trackers: str):
  config = get_config()
  config.train.trackers = trackers
  return config


def read_events(directory: pathlib.Path) -> list[Event]:
  """All events of a directory: records of length, its sum, data, its sum."""
  events = []
  for path in sorted(directory.glob("events.*")):
    data, place = path.read_bytes(), 0
    while place < len(data):
      (length,) = struct.unpack_from("<Q", data, place)
      place += 12
      events.append(Event.FromString(data[place : place + length]))
      place += length + 4
  return events


def scalars(events: list[Event]) -> dict[str, tuple[int, float]]:
  return {
    value.tag: (event.step, value.simple_value)
    for event in events
    for value in event.summary.value
    if value.HasField("simple_value")
  }


def test_a_value_by_slot_is_a_curve_of_its_own():
  assert flatten("train", RECORD) == {
    "train/loss": 2.5,
    "train/accuracy/1": 0.5,
    "train/accuracy/2": 0.25,
    "train/slots": 31,
    "train/text": "Hi!",
  }


def test_json_lines_are_always_written(tmp_path):
  with open_trackers(configured(), str(tmp_path), 0) as log:
    log.write("train", 7, RECORD)
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert line == {"kind": "train", "step": 7, **RECORD}


def test_tensorboard_events_say_what_was_logged(tmp_path):
  config = configured("tensorboard")
  with open_trackers(config, str(tmp_path), 0) as log:
    log.write("train", 7, RECORD)
    log.write("held_out", 9, {"tau": 1.5})
  events = read_events(tmp_path / "tensorboard")
  assert scalars(events) == {
    "train/loss": (7, 2.5),
    "train/accuracy/1": (7, 0.5),
    "train/accuracy/2": (7, 0.25),
    "train/slots": (7, 31.0),
    "held_out/tau": (9, 1.5),
  }
  texts = [v for e in events for v in e.summary.value if v.tensor.string_val]
  assert [value.tensor.string_val[0] for value in texts] == [b"Hi!"]
  assert json.loads((tmp_path / "metrics.jsonl").read_text().split("\n")[0])


def test_a_resumed_run_hides_what_came_after_its_step(tmp_path):
  config = configured("tensorboard")
  with open_trackers(config, str(tmp_path), 20) as log:
    log.write("train", 21, RECORD)
  starts = [
    event.step
    for event in read_events(tmp_path / "tensorboard")
    if event.session_log.status == SessionLog.START
  ]
  assert starts == [21]


@pytest.fixture
def wandb(monkeypatch) -> types.SimpleNamespace:
  """A stand-in for the package, which remembers its calls."""
  calls = types.SimpleNamespace(begun=[], logged=[], finished=0)

  def init(**options):
    calls.begun.append(options)
    return types.SimpleNamespace(
      log=lambda values, step: calls.logged.append((step, values)),
      finish=lambda: setattr(calls, "finished", calls.finished + 1),
    )

  module = types.ModuleType("wandb")
  module.init = init
  monkeypatch.setitem(sys.modules, "wandb", module)
  return calls


def test_weights_and_biases_gets_the_run_and_its_config(tmp_path, wandb):
  config = configured("wandb")
  with open_trackers(config, str(tmp_path), 0) as log:
    log.write("train", 7, RECORD)
    assert not wandb.finished
  assert wandb.finished == 1
  (options,) = wandb.begun
  assert options["project"] == "dflash_jax" and options["name"] == "tiny"
  assert options["config"]["train"]["steps"] == config.train.steps
  assert wandb.logged == [(7, flatten("train", RECORD))]


def test_a_resumed_run_continues_its_own_and_a_new_one_begins_anew(
  tmp_path, wandb
):
  for step in (0, 20, 0):
    with open_trackers(configured("wandb"), str(tmp_path), step):
      pass
  first, resumed, another = (options["id"] for options in wandb.begun)
  assert first == resumed != another
  assert {options["resume"] for options in wandb.begun} == {"allow"}


def test_of_several_processes_the_first_alone_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with open_trackers(configured("tensorboard"), str(tmp_path), 0) as log:
    log.write("train", 7, RECORD)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("tracker", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_with_the_command(
  monkeypatch, tracker, package
):
  monkeypatch.setitem(sys.modules, package, None)  # as if not installed
  with pytest.raises(ConfigError, match=rf"pip install {package}$"):
    check_trackers((tracker,))


def test_an_unknown_tracker_is_refused():
  with pytest.raises(ConfigError, match="'mlflow' is unknown; choose 'tensorb"):
    check_trackers(("mlflow",))
