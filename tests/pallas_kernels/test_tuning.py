"""Tables of tuned configurations: what is read, refused, searched, written."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest

from pallas_kernels import compile_check, tune, tuning
from pallas_kernels.block_attention.config import (
  choose_config as choose_attention,
)
from pallas_kernels.block_verify.config import choose_config as choose_verify
from pallas_kernels.devices import Device
from pallas_kernels.fp8_matmul.config import choose_config as choose_matmul
from pallas_kernels.lm_head_verify.config import choose_config as choose_head
from pallas_kernels.measurement import Row
from pallas_kernels.tune import TRIALS, Trial
from tests.pallas_kernels.stubs import stub

# Of each operation: a call, and an entry that says something of it.
CHOSEN = {
  "lm_head_verify": (
    lambda: choose_head("sm90", 13),
    dict(rows=16, draws=0),
    dict(stages=4, tile_vocab=64),
  ),
  "block_attention": (
    lambda: choose_attention("sm100", 64, 128),
    dict(head_width=128),
    dict(split_slots=1024),
  ),
  "block_verify": (
    lambda: choose_verify(49152),
    dict(vocabulary=49152),
    dict(raced=512),
  ),
  "fp8_matmul": (
    lambda: choose_matmul("sm90", 16, 1536, 576, 132),
    dict(features=1536, width=576),
    dict(splits=3),
  ),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(tuning, "FOLDER", tmp_path)
  return tmp_path


def entry(operation, shape, config, **fields):
  record = dict(operation=operation, shape=shape, config=config)
  return record | dict(seconds=1e-6, seconds_by_rule=2e-6) | fields


def write(*entries, text=None):
  """The table of this CPU."""
  file = tuning.file_of("cpu")
  file.write_text(text or json.dumps({"device": "cpu", "entries": entries}))
  tuning.read.cache_clear()
  return file


# --- Reading ------------------------------------------------------------------


def test_every_operation_can_be_tuned():
  assert set(tuning.FIELDS) == set(compile_check.OPERATIONS) == set(CHOSEN)


@pytest.mark.parametrize("operation", CHOSEN)
def test_an_entry_changes_its_own_shape_alone(operation):
  choose, shape, config = CHOSEN[operation]
  rule = choose()
  other = dict.fromkeys(shape, 32)
  write(entry(operation, other, config))
  assert choose() == rule
  write(entry(operation, other, config), entry(operation, shape, config))
  assert choose() == dataclasses.replace(rule, **config) != rule
  # Of another kind of device.
  write().rename(tuning.file_of("NVIDIA B200"))
  tuning.read.cache_clear()
  assert choose() == rule


def test_the_table_of_a_kind_of_device_is_found_by_its_name(folder):
  file = tuning.file_of("NVIDIA H100 80GB HBM3")
  assert file == folder / "nvidia_h100_80gb_hbm3.json"


GOOD = entry(*((name := "block_verify"), *CHOSEN[name][1:]))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "Expecting property name"),
    ("[]", "list indices must be"),
    ('{"device": "cpu"}', "no 'entries'"),
    ('{"entries": [7]}', "entry 0: .*must be a mapping"),
  ],
)
def test_a_damaged_table_is_named(text, message):
  file = write(text=text)
  with pytest.raises(ValueError, match=message) as refused:
    choose_verify(49152)
  assert str(refused.value).startswith(f"{file}: ")
  assert "make it anew with `python -m pallas_kernels.tune`" in str(
    refused.value
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(operation="matmul"), "entry 1: 'matmul' is none of lm_head_verify"),
    (dict(shape={}), "entry 1: shape {} must have vocabulary"),
    (dict(shape=dict(vocabulary=8, rows=8)), "must have vocabulary"),
    (dict(config={}), "entry 1: config {} may have measured, compared, raced"),
    (dict(config=dict(stages=4)), "may have measured, compared, raced"),
    (dict(config=dict(raced=512.0)), "raced=512.0; use a whole number"),
    (dict(config=dict(raced=-512)), "raced=-512; use a whole number"),
    (dict(shape=dict(vocabulary=True)), "vocabulary=True; use a whole number"),
    (dict(speed=3), "unexpected keyword argument 'speed'"),
  ],
)
def test_an_entry_that_says_what_it_cannot_is_named(changes, message):
  file = write(GOOD, GOOD | changes)
  with pytest.raises(ValueError) as refused:
    choose_head("sm90", 1)  # whichever operation asks
  assert str(file) in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize(
  ("operation", "choose", "config", "message"),
  [
    (
      "lm_head_verify",
      lambda: choose_head("sm90", 16),
      dict(stages=13),
      "rows=16 draws=0: stages=13: stages must be 2 to 12, as they fit in "
      "232448 bytes",
    ),
    (
      "lm_head_verify",
      lambda: choose_head("sm100", 16),
      dict(tile_vocab=64),
      "tile_vocab must be 128, the lanes of tensor memory",
    ),
    (
      "lm_head_verify",
      lambda: choose_head("sm90", 16),
      dict(tile_vocab=320),
      "tile_vocab must be a multiple of 64 up to 256",
    ),
    (
      "block_attention",
      lambda: choose_attention("sm90", 16, 128),
      dict(split_slots=544),
      "split_slots must be a multiple of 64 from 256 on",
    ),
    (
      "block_attention",
      lambda: choose_attention("sm90", 16, 128),
      dict(split_slots=128),
      "a multiple of 64 from 256 on",
    ),
    (
      "block_verify",
      lambda: choose_verify(49152),
      dict(raced=700),
      "raced must be a multiple of 512 up to 8192",
    ),
    (
      "block_verify",
      lambda: choose_verify(49152),
      dict(measured=16384),
      "measured must be a multiple of 512 up to 8192",
    ),
    (
      "fp8_matmul",
      lambda: choose_matmul("sm90", 16, 1536, 576, 132),
      dict(splits=4),
      "splits must divide the 9 steps of the width",
    ),
  ],
)
def test_what_no_kernel_can_have_is_refused(operation, choose, config, message):
  file = write(entry(operation, CHOSEN[operation][1], config))
  with pytest.raises(ValueError) as refused:
    choose()
  said = str(refused.value)
  assert said.startswith(f"{file}: {operation} ") and message in said
  assert said.endswith("or delete it")


# --- Searching ----------------------------------------------------------------


@pytest.mark.parametrize("trial", TRIALS, ids=str)
def test_a_trial_is_of_real_cases_and_has_candidates(trial):
  names = {case.name for case, _ in compile_check.cases("sm90", twins=True)}
  assert trial.cases and set(trial.cases) <= names
  fields = tuning.FIELDS[trial.operation]
  assert set(trial.shape) == set(fields.shape)
  first, *others = trial.candidates()
  assert first == {}
  assert others and all(set(c) == set(fields.config) for c in others)


def test_trials_are_apart():
  for one, other in itertools.combinations(TRIALS, 2):
    assert (one.operation, one.shape) != (other.operation, other.shape)


@pytest.mark.parametrize("architecture", ["sm90", "sm100"])
def test_some_candidates_can_be_had_and_differ_from_the_rule(architecture):
  for trial in TRIALS:
    found = set()
    for fields in trial.candidates():
      with tuning.trying(trial.operation, fields):
        try:
          found.add(choose_for(trial, architecture))
        except ValueError:
          assert fields
    assert len(found) > 1, trial


def choose_for(trial, architecture):
  shape = trial.shape
  if trial.operation == "lm_head_verify":
    return choose_head(architecture, shape["rows"], draws=bool(shape["draws"]))
  if trial.operation == "block_attention":
    return choose_attention(architecture, 64, shape["head_width"])
  if trial.operation == "block_verify":
    return choose_verify(shape["vocabulary"])
  features, width = shape["features"], shape["width"]
  return choose_matmul(architecture, 16, features, width, 132)


def test_a_trial_stands_before_any_table():
  choose, shape, config = CHOSEN["block_verify"]
  rule = choose()
  write(entry("block_verify", shape, config))
  tabled = choose()
  with tuning.trying("block_verify", {}):
    assert choose() == rule != tabled
  with tuning.trying("block_verify", dict(raced=2048)):
    assert choose().raced == 2048
  assert choose() == tabled


# Seconds by (raced, case): what a timer would find.
TRIAL = Trial("block_verify", {"vocabulary": 49152}, ("op/a", "op/b"))
CASES = [stub(name="op/a"), stub(name="op/b")]


def clock_of(seconds):
  """A timer: of the configuration chosen now, as an operation would choose."""

  def clock(case):
    taken = seconds(choose_verify(49152), case.name)
    problem = "" if taken else "wrong result: 3 of 7 differ"
    return Row(case.name, "sm90", taken, problem=problem)

  return clock


def test_the_fastest_by_the_sum_of_cases_is_kept(capsys):
  def seconds(config, name):
    first = 1e-6 * (3 if config.raced == 512 else 7)
    second = 1e-6 * (20 if config.raced == 512 else 9)
    return first if name == "op/a" else second - 1e-9 * config.measured

  found = tune.search(TRIAL, CASES, clock_of(seconds))
  assert found.config["raced"] != 512 and found.config["measured"] == 8192
  assert found.seconds == pytest.approx(16e-6 - 8192e-9)
  assert found.seconds_by_rule == pytest.approx(16e-6 - 4096e-9)
  assert "rule of thumb" in capsys.readouterr().out


def test_what_cannot_be_had_or_is_wrong_is_never_kept():
  """Though it is the fastest, if only in one case."""

  def seconds(config, name):
    if config.raced == 512:
      return None if name == "op/b" else 1e-9
    return 5e-6 if config.raced == 2048 else 9e-6

  assert tune.search(TRIAL, CASES, clock_of(seconds)).config["raced"] == 2048


def test_the_rule_stays_unless_it_is_beaten_by_a_margin():
  def seconds(config, name):
    return 1e-6 * (0.98 if config.raced == 512 else 1)

  assert tune.search(TRIAL, CASES, clock_of(seconds)) is None


def test_without_a_time_of_the_rule_there_is_no_entry():
  assert tune.search(TRIAL, CASES, clock_of(lambda *_: None)) is None


def test_the_table_is_what_choose_config_reads_next():
  file = write(entry("fp8_matmul", *CHOSEN["fp8_matmul"][1:]), GOOD)
  clock = clock_of(lambda config, _: 1e-9 * config.raced)
  tune.run([TRIAL], CASES, clock, file, "cpu")
  assert choose_verify(49152).raced == 512
  assert CHOSEN["fp8_matmul"][0]().splits == 3  # another's entry stays
  record = json.loads(file.read_text())
  assert list(record) == ["device", "versions", "date", "command", "entries"]
  assert record["device"] == "cpu" and record["versions"]["jax"]
  assert record["command"].startswith("python -m pallas_kernels.tune")
  # Found no better a second time, with the rule itself as fast: it goes.
  tune.run([TRIAL], CASES, clock_of(lambda *_: 1e-6), file, "cpu")
  assert [e.operation for e in tuning.read(file)] == ["fp8_matmul"]


def test_a_cpu_is_not_tuned():
  done = subprocess.run(
    [sys.executable, "-m", "pallas_kernels.tune"],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 1
  assert "no kernel runs on cpu; tune on a GPU" in done.stderr


def test_no_table_is_asked_for_in_a_folder_that_has_none(monkeypatch):
  monkeypatch.setattr(
    Device, "current", lambda: Device("NVIDIA B200", "sm100", 148)
  )
  assert tuning.read(tuning.file_of("NVIDIA B200")) == ()
