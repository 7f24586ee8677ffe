"""Reports: what is read, what is refused, what the tables say."""

import json
import pathlib
import re

import pytest

from dflash_jax.config import ConfigError
from eval import page, pareto, report, runs
from eval.findings import tabulate
from eval.markdown import to_markdown
from tests.commands import run_module
from tests.eval import reports

ROOT = pathlib.Path(__file__).parents[2]
HOSTILE = "<script>x</script>|`[a](b)"


@pytest.fixture
def found(tmp_path):
  """Runs and curves of a full directory of records."""
  return runs.read([reports.save(reports.full(), tmp_path / "runs")])


def table(tables, title):
  """The rows of a table, as dictionaries by heading."""
  (one,) = [each for each in tables if each.title == title]
  return [dict(zip(one.head, row, strict=True)) for row in one.rows]


# --- Reading ------------------------------------------------------------------


def test_runs_know_what_they_are(found):
  (first, *_), (curve,) = found
  assert (first.drafter, first.prompts) == ("mine", "a longer name of a prompt "
    "set than fits")  # fmt: skip
  assert len({run.key for run in found[0]}) == 8
  assert len(first.replies.prompt) == 3
  assert curve.workflow == "requests" and len(curve.points) == 6


def test_older_records_are_read_without_their_missing_parts(tmp_path):
  old = reports.make()
  for name in ("replies", "intervals", "prompt_set", "drafter", "protocol"):
    del old[name]
  (run,), _ = runs.read([reports.save({"chat": old}, tmp_path)])
  assert (run.drafter, run.prompts, run.replies) == ("mine", "chat", None)
  (row,) = table(tabulate([run], []), "Side by side, temperature 0")[1:]
  assert row["speed-up"] == "2.00x" and row["tau, per reply"] == "2.03"
  assert page.to_html([run], [])


def test_records_in_the_repository_can_be_reported():
  """Sweeps of the default drafter and its agents, written by older versions."""
  results = ROOT / "docs" / "results"
  found = runs.read(
    [
      str(results / "default_drafter" / "chat.json"),
      str(results / "serving" / "agents.json"),
    ]
  )
  assert [run.drafter for run in found[0]] == [
    "smollm2_135m width=fixed:3",
    "smollm2_135m width=fixed:7",
  ]
  assert "speculative+shared" in to_markdown(*found)
  assert "<svg" in page.to_html(*found)


@pytest.mark.parametrize(
  "text, complaint",
  [
    ("{", "is not JSON"),
    ("[1]", "holds no JSON object"),
    ("{}", "'requests' is not a number"),
    ('{"measurements": 3}', "'measurements' is not a list"),
    ('{"measurements": [{"mode": "a"}]}', "'measurements.concurrency'"),
    ('{"points": {}}', "'points' is not a list"),
  ],
)
def test_what_is_no_record_is_named_with_a_remedy(text, complaint, tmp_path):
  file = tmp_path / "x.json"
  file.write_text(text)
  with pytest.raises(ConfigError) as caught:
    runs.read([str(file)])
  assert complaint in str(caught.value)
  assert str(file) in str(caught.value)
  assert "give files that eval.main" in str(caught.value)


@pytest.mark.parametrize(
  "change, complaint",
  [
    ({"speedup": "fast"}, "'speedup' is not a number"),
    ({"speedup": True}, "'speedup' is not a number"),
    ({"histogram": [1, None]}, "'histogram' is not a list of numbers"),
    ({"config": []}, "'config' is not a dict"),
    ({"replies": {"prompt": [1]}}, "'replies' are damaged"),
  ],
)
def test_damaged_record_is_refused(change, complaint, tmp_path):
  where = reports.save({"x": reports.make() | change}, tmp_path)
  with pytest.raises(ConfigError, match=complaint):
    runs.read([where])


def test_what_is_not_there_is_named(tmp_path):
  with pytest.raises(ConfigError, match="cannot read .*nothing.json"):
    runs.read([str(tmp_path / "nothing.json")])
  with pytest.raises(ConfigError, match="holds no .json file"):
    runs.read([str(tmp_path)])


# --- Tables -------------------------------------------------------------------


def test_table_has_plain_decoding_and_every_drafter(found):
  rows = table(tabulate(*found), "Side by side, temperature 1")
  assert [row["drafter"] for row in rows] == ["plain", "mine", "ngram"] * 2
  plain, mine, _ = rows[3:]
  assert plain["prompts"] == "few" and plain["speed-up"] == "1.00x"
  assert plain["tokens/s"].startswith("25.0 [")
  assert mine["tau, per reply"] == "2.03 [1.25, 2.42]"
  assert mine["tau, per round"] == "1.89"
  assert mine["tokens/s"].startswith("50.0 [")
  assert mine["speed-up"] == "2.00x [0.80, 2.50]"
  assert mine["identical"] == "100.0%" and mine["promise"] == "tokens"


def test_tables_of_what_costs_extra(found):
  tables = tabulate(*found)
  (ladder, *_) = table(tables, "Losslessness")
  assert ladder["identical replies"] == "2 of 3"
  assert ladder["ties among the rest"] == "1 of 1"
  assert ladder["tokens confirmed"] == "1,234 of 1,234"
  times = table(tables, "A round's time, ms")
  assert [(r["drafter"], r["T"]) for r in times] == [
    (name, t) for t in "01" for name in ("plain", "mine", "ngram")
  ]
  assert times[1]["verify"] == "12.50" and times[1]["parts / whole"] == "107%"
  (memory, _) = table(tables, "Memory, MiB")
  assert memory["target"] == "600.0" and memory["peak"] == "1,500.0"


def test_accuracy_and_categories_are_shown_where_a_record_has_them(tmp_path):
  extra = {
    "accuracy": {
      "plain": 0.25,
      "speculative": 0.5,
      "n": 4,
      "interval": [-0.1, 0.6],
      "how": "last number",
    },
    "by_category": {
      "math": {"replies": 2, "tau_per_request": 2.5, "speedup": 1.75}
    },
  }
  where = reports.save({"x": reports.make(**extra)}, tmp_path)
  tables = tabulate(*runs.read([where]))
  (accuracy,) = table(tables, "Task accuracy")
  assert accuracy["plain"] == "25.0%" and accuracy["speculative"] == "50.0%"
  assert accuracy["95% of the difference"] == "-10.0% to +60.0%"
  (category,) = table(tables, "By category")
  assert category["category"] == "math" and category["speed-up"] == "1.75x"


def test_lossy_output_is_called_lossy(tmp_path):
  where = reports.save({"x": reports.make(guarantee="none")}, tmp_path)
  assert "LOSSY" in to_markdown(*runs.read([where]))


# --- Throughput ---------------------------------------------------------------


def test_ratio_is_taken_at_one_interactivity():
  plain = [(30.0, 30.0), (20.0, 80.0), (10.0, 160.0)]
  assert pareto.reach(plain) == 30.0
  assert pareto.throughput_at(plain, 25.0) == 55.0  # halfway
  assert pareto.throughput_at(plain, 20.0) == 80.0
  assert pareto.throughput_at(plain, 5.0) == 160.0  # it may be faster
  assert pareto.ratio_at(plain, (25.0, 110.0)) == 2.0
  # Throughput that falls with more in flight is nobody's choice.
  assert pareto.throughput_at([*plain, (5.0, 90.0)], 5.0) == 160.0


def test_no_ratio_is_quoted_where_plain_decoding_ends():
  plain = [(30.0, 30.0), (20.0, 80.0)]
  assert pareto.throughput_at(plain, 30.1) is None
  assert pareto.ratio_at(plain, (50.0, 50.0)) is None
  assert pareto.ratio_at([], (50.0, 50.0)) is None


def test_table_of_throughput_says_where_plain_decoding_ends(found):
  rows = table(tabulate(*found), "Throughput, mine, requests")
  ratios = [row["at this interactivity, over plain"] for row in rows]
  assert ratios == ["", "", "", "plain does not reach it", "1.82x", "0.50x"]


# --- Text ---------------------------------------------------------------------


def test_equal_records_give_equal_pages(found):
  assert page.to_html(*found) == page.to_html(*found)
  again = runs.read(sorted({run.source for run in found[0]}))
  assert page.to_html(again[0], []) == page.to_html(found[0], [])


def test_names_are_data(tmp_path):
  found = runs.read([reports.save(reports.full(HOSTILE), tmp_path / "runs")])
  html, text = page.to_html(*found), to_markdown(*found)
  assert "<script" not in html and "&lt;script&gt;" in html
  assert "<script" not in text
  assert "\\[a](b)" in text
  for part in text.split("\n\n"):
    if part.startswith("| "):
      cells = {len(re.findall(r"(?<!\\)\|", row)) for row in part.split("\n")}
      assert len(cells) == 1, part


def test_page_has_no_way_out(found):
  html = page.to_html(*found)
  assert "default-src 'none'" in html
  # The only address is the name of SVG.
  assert set(re.findall(r"https?://[^\"' ]*", html)) == {
    "http://www.w3.org/2000/svg"
  }
  assert "url(" not in html and "<script" not in html


def test_a_place_that_is_no_number_is_no_figure(tmp_path):
  broken = reports.make()
  broken["intervals"]["speedup"] = [float("nan"), 2.0]
  where = reports.save({"x": broken}, tmp_path)
  with pytest.raises(ValueError, match="no place in a figure|NaN|integer"):
    page.to_html(*runs.read([where]))


def test_program_writes_both_files_or_prints(tmp_path):
  where = reports.save(reports.full(), tmp_path / "runs")
  html, text = tmp_path / "new" / "x.html", tmp_path / "x.md"
  done = run_module(
    "eval.report", where, f"--html={html}", f"--markdown={text}"
  )
  assert done.returncode == 0, done.stderr
  assert html.read_text().startswith("<!DOCTYPE html>")
  assert text.read_text().startswith("# Speculative decoding, measured")
  assert done.stdout == ""


def test_program_names_mistakes(tmp_path):
  where = reports.save({"x": reports.make()}, tmp_path)
  with pytest.raises(ConfigError, match="x.pdf must end in .html"):
    report.check_names("x.pdf", None)
  with pytest.raises(ConfigError, match="must end in .md"):
    report.check_names(None, "x.html")
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot write .*another --html"):
    report.write([where], str(tmp_path / "file" / "x.html"), None)


def test_a_page_that_is_too_large_is_refused(tmp_path, monkeypatch):
  where = reports.save({"x": reports.make()}, tmp_path)
  monkeypatch.setattr(report, "LIMIT", 1000)
  with pytest.raises(ConfigError, match="report fewer at a time"):
    report.write([where], str(tmp_path / "x.html"), None)


def test_refused_points_alone_are_no_report(tmp_path):
  sweep = {"points": [{"refused": "chains only", "settings": {}}]}
  where = tmp_path / "x.json"
  where.write_text(json.dumps(sweep))
  with pytest.raises(ConfigError, match="every point was refused"):
    report.write([str(where)], None, None)
