"""Numbers of agents' chains, against sums done by hand; table, plot, report."""

import copy
import json

import pytest

from dflash_jax.config import AgentsConfig, Config, ConfigError
from dflash_jax.engine import Result
from eval import agents_report, records, workflows
from eval.closed_loop import Reply, Run
from eval.workload import Measurement

LINES = (
  "pair/first: say {task}",
  "pair/second after first tokens=7: and\n{first}",
  "other/only: {task}",
)
SIZES = {
  "common_tokens": 57,
  "workflows": [
    {"name": "pair", "requests": 2, "depth": 2, "longest_tokens": 123},
    {"name": "other", "requests": 1, "depth": 1, "longest_tokens": 45},
  ],
}


def result(tokens, arrivals, *, rounds, width=0.0, prompt=100, hit=0):
  """A reply of so many equal tokens."""
  return Result(
    lane="",
    text="",
    tokens=tokens,
    slots=[0] * len(tokens),
    finish="budget",
    error=None,
    prompt_tokens=prompt,
    hit_tokens=hit,
    rounds=rounds,
    tau=0.0,
    accepted=[],
    width=width,
    queued_s=0.0,
    arrivals=arrivals,
    total_s=arrivals[-1][0],
  )


def plain_run():
  """Two chains of two requests, a token at a time but for the last."""
  steady = [(0.5 + 0.1 * i, i + 1) for i in range(5)]
  replies = {
    (0, "first", 0): Reply((1,), result([7] * 5, steady, rounds=4)),
    (0, "second", 0): Reply((2,), result([8] * 5, steady, rounds=4)),
    (1, "first", 0): Reply((3,), result([9] * 5, steady, rounds=4)),
    (1, "second", 0): Reply((4,), result([6], [(0.9, 1)], rounds=0)),
  }
  return Run(
    {1: 4.0, 0: 2.0}, replies, wall_s=8.0, idle_s=2.0, peak_bytes=2**20
  )


def fast_run():
  """Bursts of two; the second chain goes another way after its first reply."""
  bursts = [(0.2, 1), (0.3, 3), (0.4, 5)]
  drafted = {"rounds": 2, "width": 3.0, "hit": 60}
  replies = {
    (0, "first", 0): Reply((1,), result([7] * 5, bursts, **drafted)),
    (0, "second", 0): Reply((2,), result([8] * 5, bursts, **drafted)),
    (1, "first", 0): Reply((3,), result([9, 9, 5], bursts[:2], rounds=2)),
    (1, "second", 0): Reply((5,), result([6], [(0.1, 1)], rounds=0)),
  }
  return Run({0: 1.0, 1: 1.0}, replies, wall_s=2.0, peak_bytes=3 * 2**20)


@pytest.fixture
def measurements():
  """Of the workflow `pair`, at two concurrencies."""
  workflow = workflows.parse(LINES)["pair"]
  found = []
  for concurrency in (1, 4):
    runs = {"plain": plain_run(), "speculative+shared": fast_run()}
    found += agents_report.summarize(Measurement(workflow, concurrency, runs))
  return found


@pytest.fixture
def record(measurements):
  config = Config(
    name="made up", agents=AgentsConfig(calls=LINES, max_new_tokens=48)
  )
  return agents_report.to_record(config, SIZES, measurements)


# --- Numbers ------------------------------------------------------------------


def test_times_of_chains_and_requests(measurements):
  plain, fast = measurements[:2]
  assert (plain["mode"], fast["mode"]) == ("plain", "speculative+shared")
  assert (plain["chains"], plain["requests"]) == (2, 4)
  assert plain["chain_s"]["all"] == [2.0, 4.0]  # by number
  assert plain["chain_s"]["p50"] == pytest.approx(3.0)
  assert plain["chain_s"]["p95"] == pytest.approx(3.9)
  assert plain["speedup"] == 1.0
  assert fast["speedup"] == pytest.approx(3.0)  # of 2 and 4, chain by chain
  assert plain["ttft_s"]["p50"] == pytest.approx(0.5)
  assert fast["ttft_s"]["p50"] == pytest.approx(0.2)


def test_tokens_of_a_burst_come_together(measurements):
  plain, fast = measurements[:2]
  # Ten tokens after the first: 0.1 s before each burst of two, then 0.
  assert plain["itl_s"]["p50"] == pytest.approx(0.1)
  assert fast["itl_s"]["p50"] == pytest.approx(0.05)
  assert fast["itl_s"]["p99"] == pytest.approx(0.1)
  assert fast["burst_s"]["p50"] == pytest.approx(0.1)
  assert plain["user_tokens_per_s"] == pytest.approx(10)
  assert fast["user_tokens_per_s"] == pytest.approx(20)
  assert plain["device_tokens_per_s"] == pytest.approx(16 / 8)
  assert fast["device_tokens_per_s"] == pytest.approx(14 / 2)
  assert (plain["idle_share"], fast["idle_share"]) == (0.25, 0.0)


def test_work_is_counted_over_all_requests(measurements):
  plain, fast = measurements[:2]
  assert (plain["tau"], plain["width"]) == (1.0, 0.0)
  assert fast["tau"] == pytest.approx((4 + 4 + 2) / 6)
  assert fast["width"] == pytest.approx((3 * 2 + 3 * 2) / 6)
  assert (fast["prompt_tokens"], fast["hit_tokens"]) == (400, 120)
  assert fast["hit_rate"] == pytest.approx(0.3)
  assert plain["hit_rate"] == 0


def test_identity_is_judged_where_prompts_are_equal(measurements):
  plain, fast = measurements[:2]
  assert (plain["identical_replies"], plain["identical_chains"]) == (1, 1)
  # Of three with the same prompt, two; the fourth's prompt followed from that.
  assert fast["identical_replies"] == pytest.approx(2 / 3)
  assert fast["identical_chains"] == pytest.approx(1 / 2)


def test_a_run_of_single_tokens_has_no_rates():
  replies = {(0, "first", 0): Reply((1,), result([6], [(0.1, 1)], rounds=0))}
  run = Run({0: 0.1}, replies, wall_s=0.1)
  workflow = workflows.parse(LINES)["other"]
  (found,) = agents_report.summarize(Measurement(workflow, 1, {"plain": run}))
  assert found["user_tokens_per_s"] == found["tau"] == 0
  assert found["itl_s"] == {"p50": 0, "p99": 0}


# --- Text and plot ------------------------------------------------------------


def test_record_says_what_each_number_means_and_survives_json(record, tmp_path):
  path = tmp_path / "agents.json"
  records.write_json(str(path), record)
  loaded = json.loads(path.read_text())
  assert {"config", "versions", "machine", "date"} <= loaded.keys()
  own = loaded["measurements"][0].keys()
  explained = {"workflow", "concurrency", "mode", "chains", "requests"}
  explained |= {"tokens", "wall_s", "prompt_tokens", "hit_tokens"}
  assert own - explained <= loaded["conventions"].keys()


def test_table_has_a_row_per_measurement(record):
  table = agents_report.to_table(record)
  assert "pair: 2 requests a chain, 2 one after the other" in table
  assert "other:" not in table  # nothing was measured of it
  assert table.count("speculative+shared") == 2
  for text in ("3.00/3.90", "3.00x", "0.20/", "50/100", "30%", "66.7%/50%"):
    assert text in table
  assert "57 tokens of system prompt" in table
  assert "nothing was compiled meanwhile" in table


def test_what_was_not_warm_is_called_so(record):
  record["measurements"][1]["compiled"] = ["jit(give)", "jit(keep)"]
  assert "2 PROGRAMS WERE COMPILED" in agents_report.to_table(record)


def test_report_has_sizes_tables_calls_and_plot(record, tmp_path):
  path, plot = tmp_path / "docs" / "agents.md", tmp_path / "plots" / "a.png"
  agents_report.write_report(str(path), record, str(plot))
  text = path.read_text()
  assert "![throughput against interactivity](../plots/a.png)" in text
  assert "## pair\n\n2 requests a chain" in text
  assert "pair/second after first tokens=7: and {first}" in text
  assert "common system prompt is (57 tokens)" in text
  rows = [line for line in text.splitlines() if line.startswith("|")]
  assert len(rows) == 2 + 4
  assert len({row.count("|") for row in rows}) == 1
  agents_report.write_report(str(path), record, None)
  assert "![" not in path.read_text()


def test_a_report_is_markdown():
  agents_report.check_report("a.md")
  with pytest.raises(ConfigError, match="must end in .md"):
    agents_report.check_report("a.html")


def test_plot_shows_every_measurement(record, tmp_path):
  path, fewer = tmp_path / "new" / "all.png", tmp_path / "fewer.png"
  agents_report.write_plot(str(path), record)
  assert path.read_bytes().startswith(b"\x89PNG")
  one_less = copy.deepcopy(record)
  del one_less["measurements"][3]
  one_less["measurements"][2]["workflow"] = "other"  # a panel more
  agents_report.write_plot(str(fewer), one_less)
  assert fewer.read_bytes() != path.read_bytes()
