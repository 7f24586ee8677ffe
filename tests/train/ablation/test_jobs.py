"""Runs as processes: order, cores, failures, and who holds the directory."""

import os
import subprocess
import sys
import time

import pytest

from train.ablation.jobs import Job, locked, run_all, split_cores
from train.files import FileError


def job(tmp_path, name, code):
  """A small program instead of a training run."""
  return Job([sys.executable, "-c", code], tmp_path / name)


@pytest.fixture
def lock(tmp_path):
  with locked(tmp_path / "grid") as descriptor:
    yield descriptor


def test_jobs_run_in_order_and_no_more_at_once_than_asked(tmp_path, lock):
  note = "import time; print(time.time()); time.sleep(.2); print(time.time())"
  for at_once in (1, 2):
    jobs = [job(tmp_path, f"{at_once}-{i}", note) for i in range(4)]
    ended = []
    run_all(
      jobs, at_once, lock, lambda job, status, ended=ended: ended.append(status)
    )
    assert ended == [0] * 4
    logs = [(each.workdir / "log.txt").read_text() for each in jobs]
    spans = [tuple(map(float, log.split())) for log in logs]
    if at_once == 1:
      assert spans == sorted(spans)
    for start, _ in spans:
      assert sum(first <= start < last for first, last in spans) <= at_once


def test_a_failure_is_told_with_its_reason_and_others_go_on(tmp_path, lock):
  bad = job(tmp_path, "bad", "print('working'); raise SystemExit('error: no')")
  good = job(tmp_path, "good", "print('fine')")
  found = {}
  run_all([bad, good], 1, lock, lambda job, status: found.update({job: status}))
  assert found == {bad: 1, good: 0}
  assert bad.last_words == "error: no"
  assert good.last_words == "fine"


def test_runs_end_with_the_one_who_waits_for_them(tmp_path, lock):
  sleeper = job(tmp_path, "sleeper", "import time; time.sleep(60)")
  short = job(tmp_path, "short", "pass")

  def interrupt(job, status):
    raise KeyboardInterrupt

  start = time.monotonic()
  with pytest.raises(KeyboardInterrupt):
    run_all([sleeper, short], 2, lock, interrupt)
  assert time.monotonic() - start < 30


def test_each_job_has_its_own_cores(tmp_path, lock):
  if not hasattr(os, "sched_getaffinity"):
    pytest.skip("this system does not say which cores a process may use")
  cores = sorted(os.sched_getaffinity(0))
  assert split_cores(1) == [cores]
  shares = split_cores(len(cores))
  assert sorted(core for share in shares for core in share) == cores
  assert split_cores(len(cores) + 1) == [cores] * (len(cores) + 1)
  # The affinity arrives while the interpreter starts.
  code = (
    "import os, time; time.sleep(.2); print(sorted(os.sched_getaffinity(0)))"
  )
  jobs = [job(tmp_path, str(i), code) for i in range(len(cores))]
  run_all(jobs, len(cores), lock, lambda job, status: None)
  assert {j.last_words for j in jobs} == {str(share) for share in shares}


def test_two_grids_do_not_share_a_directory(tmp_path):
  busy = pytest.raises(FileError, match="in use by another")
  with locked(tmp_path), busy, locked(tmp_path):
    pass
  with locked(tmp_path):  # free again
    pass


def test_runs_hold_the_directory_too(tmp_path, lock):
  held = job(tmp_path, "held", f"import os; print(os.fstat({lock}).st_ino)")
  run_all([held], 1, lock, lambda job, status: None)
  assert held.last_words == str(os.fstat(lock).st_ino)


def test_a_run_left_behind_holds_the_directory(tmp_path):
  code = "import time; time.sleep(60)"
  with locked(tmp_path) as descriptor:
    orphan = subprocess.Popen(
      [sys.executable, "-c", code], pass_fds=(descriptor,)
    )
  try:
    busy = pytest.raises(FileError, match="runs that it left behind")
    with busy, locked(tmp_path):
      pass
  finally:
    orphan.kill()
    orphan.wait()
  with locked(tmp_path):
    pass
