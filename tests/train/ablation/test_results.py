"""results.jsonl: what a kill or a damaged disk leaves of it; the report."""

import json

import pytest

from dflash_jax.config import ConfigError
from tests.train.ablation.test_comparison import reply
from train.ablation.describe import check_judging
from train.ablation.report import to_markdown, write_report
from train.ablation.results import Results
from train.ablation.summary import summarize
from train.files import FileError

JUDGED = {
  "max_new_tokens": 64,
  "batch_size": 1,
  "repeats": 1,
  "decode": {"top_p": 1.0},
  "cpu": "a cpu",
  "device": "a device",
  "prompts": {"few": {"count": 2, "digest": "abc"}},
}
GRID = {
  "kind": "grid",
  "command": "python -m train.ablate",
  "target": "a target",
  "training": {
    "steps": 7,
    "batch_size": 2,
    "num_anchors": 5,
    "sequences": 1234,
    "tokens": 56789,
  },
  "arms": [
    {"name": "base", "settings": {}, "parameters": 12_280_704},
    {"name": "wide", "settings": {"drafter.mlp_width": "9"}, "parameters": 10},
    {"name": "late", "settings": {}, "parameters": 10},
  ],
  "pairs": [{"arm": "wide", "base": "base", "note": "+5%, published"}],
  "points": ["width=fixed:3", "rule=token"],
  "judged": JUDGED,
  "machine": {"device": "cpu", "cpu": "a cpu", "cores": 2},
  "versions": {"jax": "0.11.2"},
  "date": "2026-11-22",
}


def trial(arm, seed, tau, seconds=0.5):
  record = {"kind": "trial", "arm": arm, "seed": seed, "steps": 7, "tau": tau}
  return record | {"step_seconds": seconds, "curve": [[7, tau]]}


@pytest.fixture
def results(tmp_path):
  """Two arms of two seeds, one run that failed, one refusal."""
  found = Results(tmp_path)
  found.add([{**GRID, "command": "an earlier one"}, GRID])
  found.add([trial("base", 0, 1.4), trial("base", 1, 1.6)])
  found.add([trial("wide", 0, 9.0), trial("wide", 0, 1.5, None)])
  for arm, gain in (("base", 0.0), ("wide", 0.25)):
    for seed in (0, 1):
      for place in (0, 1):
        tau = 2.0 + seed + place + gain
        found.add([reply(arm, seed, place, tau=tau, seconds=0.01)])
  why = "TrainingDiverged: loss is nan"
  found.add([{"kind": "failure", "arm": "late", "seed": 0, "why": why}])
  found.add([{"kind": "failure", "arm": "base", "seed": 0, "why": "killed"}])
  refusal = {"kind": "refusal", "arm": "wide", "point": "rule=token"}
  found.add([refusal | {"seed": s, "why": "no law"} for s in (0, 1)])
  return found


# --- The file -----------------------------------------------------------------


def test_a_line_cut_short_is_dropped_and_the_rest_goes_on(tmp_path):
  results = Results(tmp_path)
  results.add([reply(place=0), reply(place=1)])
  with results.path.open("a") as file:
    file.write('{"kind": "reply", "arm": "a", "se')
  again = Results(tmp_path)
  assert [r["place"] for r in again.of_kind("reply")] == [0, 1]
  again.add([reply(place=2)])
  lines = results.path.read_text().splitlines()
  assert [json.loads(line)["place"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize("line", ["not json", "[1]", "{}", '{"kind": 3}'])
def test_a_damaged_line_is_refused_with_the_remedy(tmp_path, line):
  path = tmp_path / "results.jsonl"
  path.write_text(f"{json.dumps(reply())}\n{line}\n")
  with pytest.raises(FileError, match=f"{path} is damaged .*delete it"):
    Results(tmp_path)


def test_the_newest_grid_counts(results):
  assert results.grid["command"] == GRID["command"]


def test_replies_decoded_otherwise_are_not_mixed(results):
  check_judging(results, JUDGED)
  more = JUDGED["prompts"] | {"new": {"count": 1, "digest": "x"}}
  check_judging(results, JUDGED | {"prompts": more})
  with pytest.raises(FileError, match="max_new_tokens 64, not 65; delete it"):
    check_judging(results, JUDGED | {"max_new_tokens": 65})
  with pytest.raises(FileError, match="device 'a device', not 'another'"):
    check_judging(results, JUDGED | {"device": "another"})
  few = {"few": {"count": 2, "digest": "other"}}
  with pytest.raises(FileError, match="other prompts in few"):
    check_judging(results, JUDGED | {"prompts": few})


# --- The report ---------------------------------------------------------------


def test_report_says_what_was_found(results):
  text = to_markdown(results, summarize(results), "ablation")
  rows = [line.strip("| ") for line in text.splitlines() if line[:1] == "|"]
  # Arms: parameters, seeds, seconds per step, walked tau.
  assert "base | the base | 12.28 | 2 | 0.50 ± 0.00 | 1.500 ± 0.141" in rows
  assert "wide | `drafter.mlp_width=9` | 0.00 | 1 | - | 1.500" in rows
  # tau of prompts and of all, tokens/s, speed-up, ms per round, identical.
  same = "100.0 ± 0.0 | 2.00 ± 0.00x"
  assert any(
    row.startswith(f"base | 3.00 ± 0.71 | 3.00 ± 0.71 | {same}") for row in rows
  ), rows
  # The pair: every reply gained a quarter, and nothing in speed.
  (pair,) = (row for row in rows if row.startswith("wide vs base"))
  assert "**+0.250** | +8.3% | +0.250 to +0.250 | 1.000x" in pair
  assert pair.endswith("2 | 2 | +5%, published")
  assert "late, seed 0, failed: TrainingDiverged: loss is nan" in text
  assert "base, seed 0, failed" not in text  # it was trained later
  assert text.count("wide cannot decode with rule=token: no law") == 1
  assert "8 of 8 replies are promised to be plain decoding's own and are." in (
    text
  )


def test_report_does_not_hide_a_reply_that_should_be_the_same(results):
  results.add([reply("base", 2, 0, identical=False)])
  text = to_markdown(results, summarize(results), "ablation")
  assert "8 of 9 replies" in text and "1 ARE NOT" in text


def test_report_is_made_of_the_file_alone(results, tmp_path):
  path = tmp_path / "docs" / "ablation.md"
  write_report(Results(tmp_path), path)
  assert path.read_text().startswith("# Ablation\n")
  for name in ("tau", "speed"):
    assert f"](ablation/{name}.png)" in path.read_text()
    png = (path.parent / "ablation" / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_there_must_be_something_to_report(tmp_path):
  results = Results(tmp_path)
  results.add([GRID])
  with pytest.raises(ConfigError, match="no results to report yet"):
    write_report(results, tmp_path / "a.md")
