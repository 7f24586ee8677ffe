"""All cases: the table, the aims, the file, and runs that go on from it."""

import dataclasses
import functools
import json
import time

import jax
import pytest

from pallas_kernels import bench, timing
from pallas_kernels.bench import AIMS, Aim, Report
from pallas_kernels.devices import Device
from pallas_kernels.measurement import Row
from tests.pallas_kernels.stubs import BOTH, MACHINE, double, stub

TIMED = Row("op/a", "sm90", 1e-6, 4e9, 0.8, 2e12, 3.0, 2, 10)


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(timing, "DISPATCH_SECONDS", 1e-4)
  monkeypatch.setattr(timing, "REPEATS", 3)


@pytest.mark.parametrize(
  ("aim", "row", "verdict"),
  [
    (Aim("op/a", share=0.8), TIMED, "met"),
    (Aim("op/.", share=0.81), TIMED, "missed"),
    (Aim("op/a", speedup=3), TIMED, "met"),
    (Aim("op/a", share=0.8, speedup=3.1), TIMED, "missed"),
    (Aim("op/a", speedup=3), dataclasses.replace(TIMED, speedup=None), "open"),
    (Aim("op/a", share=0.1), dataclasses.replace(TIMED, problem="x"), "open"),
    (Aim("op/a", share=0.1), Row("op/a", "sm90", problem="x"), "open"),
  ],
)
def test_aims(aim, row, verdict):
  xla = dataclasses.replace(row, implementation="xla")
  other = dataclasses.replace(row, case="op/a longer")
  (found,) = bench.judge([xla, row, other], [aim])
  assert found["verdict"] == verdict
  assert (found["cases"], found["implementation"]) == ("op/a", "sm90")


def test_every_aim_is_of_some_case_that_comes_first():
  cases = bench.all_cases("")
  covered = [any(aim.covers(case.name) for aim in AIMS) for case in cases]
  assert covered == sorted(covered, reverse=True)
  for aim in AIMS:
    assert any(aim.covers(case.name) for case in cases), aim


def test_verdicts_are_printed(capsys):
  aims = [Aim("op/a", share=0.85), Aim("op/a", speedup=1.2)]
  bench.print_verdicts(bench.judge([TIMED], aims))
  assert capsys.readouterr().out.splitlines() == [
    "missed op/a sm90: 80% of copy, 3.00x xla; the aim is 85% of copy",
    "met    op/a sm90: 80% of copy, 3.00x xla; the aim is 1.20x xla",
  ]


def test_table(capsys):
  report = Report(MACHINE, rows=[TIMED, Row("op/b", "xla", problem="no")])
  bench.run([], BOTH, report)
  heading, timed, failed = capsys.readouterr().out.splitlines()
  assert " ".join(heading.split()) == "case us GB/s of copy TFLOP/s x xla"
  assert " ".join(timed.split()) == "op/a sm90 1.0 4 80.0% 2.0 3.00x"
  assert " ".join(failed.split()) == "op/b xla no"
  assert len(timed) == len(heading)


def test_file_holds_what_a_reader_needs(tmp_path, capsys):
  report = Report(MACHINE, tmp_path / "kernels.json")
  bench.run([stub()], BOTH, report)
  record = json.loads(report.file.read_text())
  assert list(record) == [
    "device",
    "versions",
    "date",
    "command",
    "python",
    "complete",
    "machine",
    "conventions",
    "aims",
    "rows",
  ]
  assert record["complete"] and record["device"] == "cpu"
  assert record["versions"]["jax"] == jax.__version__
  assert [row["implementation"] for row in record["rows"]] == list(BOTH)
  fields = {field.name for field in dataclasses.fields(Row)}
  assert set(record["rows"][0]) == fields
  assert set(record["conventions"]) <= fields
  assert not list(tmp_path.glob("*.partial"))
  assert capsys.readouterr().out.count("op/stub") == 2


def test_stopped_run_is_resumed(tmp_path):
  calls = []

  def call(x, *, implementation, name):
    calls.append((name, implementation))
    return double(x, implementation=implementation)

  cases = [
    stub(functools.partial(call, name=name), name=f"op/{name}")
    for name in "abc"
  ]
  first = Report(MACHINE, tmp_path / "kernels.json")
  bench.run(cases[:2], BOTH, first)
  bench.run(cases, BOTH, first, deadline=time.monotonic() - 1)
  record = json.loads(first.file.read_text())
  first.complete = record["complete"] = False
  # One that failed is tried again; one that never ended is not.
  record["rows"][1] |= {"seconds": None, "problem": "failed"}
  record["rows"][3] |= {"seconds": None, "problem": bench.ENDLESS}
  first.file.write_text(json.dumps(record))
  calls.clear()
  second = Report(MACHINE, first.file)
  second.resume()
  bench.run(cases, BOTH, second)
  assert {name for name, _ in calls} == {"a", "c"}
  assert second.complete
  assert sorted((row.case, row.implementation) for row in second.rows) == [
    (f"op/{name}", implementation)
    for name in "abc"
    for implementation in sorted(BOTH)
  ]
  assert [row.case for row in second.failures()] == ["op/b"]


def test_deadline_starts_no_case(tmp_path):
  report = Report(MACHINE, tmp_path / "kernels.json")
  bench.run([stub()], BOTH, report, deadline=time.monotonic() - 1)
  assert not report.complete and not report.rows
  assert not json.loads(report.file.read_text())["complete"]


def test_rows_of_another_device_are_not_kept(tmp_path):
  file = tmp_path / "kernels.json"
  report = Report(MACHINE, file, [TIMED], complete=True)
  report.write()
  other = Report(dataclasses.replace(MACHINE, kind="NVIDIA B200"), file)
  other.resume()
  assert not other.rows
  same = Report(MACHINE, file)
  same.resume()
  assert same.rows == [TIMED]


def test_file_says_what_is_being_measured(tmp_path):
  """A hang can be told from a run that was merely stopped."""
  file, seen = tmp_path / "kernels.json", []

  def call(x, *, implementation):
    rows = json.loads(file.read_text())["rows"]
    seen.append({row["implementation"]: row["problem"] for row in rows})
    return double(x, implementation=implementation)

  bench.run([stub(call)], BOTH, Report(MACHINE, file))
  assert seen[0] == {"xla": bench.ENDLESS, "sm90": bench.ENDLESS}
  assert seen[-1] == {"xla": "", "sm90": bench.ENDLESS}


def test_implementations_that_can_run():
  hopper = Device("NVIDIA H100", "sm90", 132)
  assert bench.choose_implementations([], hopper) == ["xla", "sm90"]
  assert bench.choose_implementations(["sm90", "xla"], hopper) == list(BOTH)
  assert bench.choose_implementations(["sm90"], hopper) == ["sm90"]
  assert bench.choose_implementations([], Device("cpu", None, 1)) == ["xla"]
  with pytest.raises(ValueError, match="sm100 cannot run on NVIDIA H100"):
    bench.choose_implementations(["sm100"], hopper)
