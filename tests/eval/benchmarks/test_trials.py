"""Programs of a model: what passes, and all that they cannot do."""

import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from dflash_jax.config import ConfigError
from eval.benchmarks import trials
from eval.benchmarks.trials import Limits, Outcome

ADD = "def add(x):\n  return x + 1\n"
TESTS = "assert add(1) == 2\n"


def probe_isolation():
  """Whether this machine lets processes shut off their network and files."""
  try:
    return trials.run("", "", Limits()).passed
  except ConfigError as error:
    assert "allow user namespaces and Landlock" in str(error)
    return False


CAN_ISOLATE = probe_isolation()
LIMITS = Limits(seconds=20.0, isolate=CAN_ISOLATE)


def run(solution, tests="", **changes):
  fields = {"seconds": 20.0, "isolate": CAN_ISOLATE}
  return trials.run(solution, tests, Limits(**fields | changes))


def test_right_program_passes_and_wrong_one_does_not():
  trials.check(LIMITS)
  assert run(ADD, TESTS) == Outcome(passed=True)
  assert run(ADD, "assert add(1) == 3") == Outcome(False, "AssertionError")
  assert run("def add(x", TESTS) == Outcome(False, "SyntaxError")
  assert run("", TESTS) == Outcome(False, "NameError")


def test_standard_library_is_there_and_nothing_else():
  imports = "import math, json, heapq, typing, dataclasses, decimal, re\n"
  assert run(imports + "'a'.encode('idna'); 'b'.encode('cp1252')").passed
  assert run("import numpy").reason == "ModuleNotFoundError"
  assert run("import eval.benchmarks").reason == "ModuleNotFoundError"


@pytest.mark.parametrize(
  ("solution", "reason"),
  [
    ("import sys; sys.exit(0)", "SystemExit"),
    ("import os; os._exit(0)", "ended before its tests did, code 0"),
    ("def add(x): quit()", "NameError"),
    ("def add(x):\n  import os; os._exit(0)", "ended before its tests did, "),
    ("def add(x):\n  raise SystemExit(0)", "SystemExit"),
    ("import os; os.kill(os.getpid(), 9)", "code -9"),
    # Claims to have passed, in every pipe and file that is open.
    (
      "import os\nfor fd in range(64):\n  try: os.write(fd, b'passed')\n"
      "  except OSError: pass\nos._exit(0)",
      "passed",
    ),
    # assert cannot be talked over.
    ("import builtins; builtins.AssertionError = ValueError\n", "NameError"),
  ],
)
def test_ending_without_an_error_is_not_passing(solution, reason):
  outcome = run(solution, TESTS)
  assert not outcome.passed and reason in outcome.reason


@pytest.mark.parametrize(
  "solution",
  [
    "while True: pass",
    "import time; time.sleep(60)",
    "import os\nos.setsid() if os.getpid() != os.getsid(0) else 0\n"
    "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "while True: pass",
    "while True: print('x' * 10**6)",
  ],
)
def test_endless_program_is_killed_in_time(solution):
  start = time.monotonic()
  assert run(solution, seconds=0.7) == Outcome(False, "time")
  assert time.monotonic() - start < 10


def test_output_goes_nowhere_however_much_it_is(capfd):
  assert run("for _ in range(99): print('x' * 10**6)").passed
  assert run("import sys; sys.stderr.write('x' * 10**6)").passed
  assert capfd.readouterr() == ("", "")


def test_memory_is_bounded():
  hog = "x = bytearray(300 * 2**20)"
  assert run(hog).passed
  assert run(hog, memory_bytes=2**28) == Outcome(False, "MemoryError")


def test_no_process_and_no_thread_can_be_started():
  assert run("import os; os.fork()").reason == "BlockingIOError"
  bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
  assert run(bomb, seconds=0.7).reason == "time"
  threads = "import threading; threading.Thread(target=print).start()"
  assert run(threads).reason == "RuntimeError"
  spawn = "import subprocess; subprocess.run(['true'])"
  assert run(spawn).reason == "BlockingIOError"


def test_nobody_is_left_when_a_program_is_killed():
  marker = f"dflash-marker-{os.getpid()}"
  run(f"x = '{marker}'\nwhile True: pass", seconds=0.5)
  # The program came by a pipe; its process is known by its parent, us.
  children = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
  assert not children.exists() or children.read_text().split() == []


def test_environment_and_input_are_empty(monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "secret")
  assert run("import os; assert 'HF_TOKEN' not in os.environ").passed
  assert run("input()").reason == "EOFError"


def test_not_a_byte_gets_into_a_file(tmp_path):
  tmp_path.chmod(0o777)
  for parent in list(tmp_path.parents)[:3]:
    parent.chmod(0o755)
  path = tmp_path / "made"
  for folder in (tmp_path, pathlib.Path(".")):
    outcome = run(
      f"f = open({str(folder / 'made')!r}, 'w'); f.write('x'); f.flush()"
    )
    assert not outcome.passed
  assert not path.exists() or path.read_text() == ""


def test_files_cannot_be_made_changed_or_removed(tmp_path):
  """Where the kernel has Landlock; elsewhere isolation is refused."""
  kept = tmp_path / "kept"
  kept.write_text("precious")
  kept.chmod(0o666)
  tmp_path.chmod(0o777)
  for parent in list(tmp_path.parents)[:3]:
    parent.chmod(0o755)
  for attempt in (
    f"open({str(tmp_path / 'new')!r}, 'w')",
    f"open({str(kept)!r}, 'w')",
    f"import os; os.truncate({str(kept)!r}, 0)",
    f"import os; os.remove({str(kept)!r})",
    f"import os; os.mkdir({str(tmp_path / 'folder')!r})",
  ):
    if CAN_ISOLATE:
      assert run(attempt) == Outcome(False, "PermissionError"), attempt
      assert kept.read_text() == "precious"
      assert os.listdir(tmp_path) == ["kept"]
    else:
      with pytest.raises(ConfigError, match="--run_code=unisolated"):
        trials.run(attempt, "", Limits())
  assert run(f"assert open({str(kept)!r}).read() == 'precious'").passed


def test_network_is_shut():
  """A listener that anybody here can reach hears nothing of the program."""
  with socket.create_server(("127.0.0.1", 0)) as listener:
    port = listener.getsockname()[1]
    connect = (
      f"import socket; socket.create_connection(('127.0.0.1', {port}), 3)"
    )
    listener.settimeout(0.3)
    assert run(connect, isolate=False).passed
    listener.accept()[0].close()
    if CAN_ISOLATE:
      assert run(connect) == Outcome(False, "OSError")
      with pytest.raises(TimeoutError):
        listener.accept()
    else:
      with pytest.raises(ConfigError, match="does not let a process shut off"):
        trials.run(connect, "", Limits())


def test_root_is_given_up():
  assert run("import os; assert os.getuid() and os.geteuid()").passed


def test_machine_that_cannot_isolate_says_so(monkeypatch):
  def refuse(*arguments, **options):
    script = "import sys; print('not permitted', file=sys.stderr); sys.exit(71)"
    return popen([sys.executable, "-c", script], **options)

  popen = subprocess.Popen
  monkeypatch.setattr(subprocess, "Popen", refuse)
  with pytest.raises(ConfigError, match=r"\(not permitted\); allow user .*"):
    trials.check(Limits())


def test_fault_of_the_cell_is_no_fault_of_the_program(monkeypatch):
  def break_down(*arguments, **options):
    return popen([sys.executable, "-c", "import nonsense"], **options)

  popen = subprocess.Popen
  monkeypatch.setattr(subprocess, "Popen", break_down)
  with pytest.raises(RuntimeError, match=r"(?s)cell\.py failed:.*nonsense"):
    run(ADD, TESTS)


def test_only_linux_can_confine(monkeypatch):
  monkeypatch.setattr(sys, "platform", "darwin")
  with pytest.raises(ConfigError, match="needs Linux.*this is darwin"):
    trials.check(LIMITS)
