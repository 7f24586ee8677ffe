"""Reports: every key, a readable table, files that are whole."""

import copy
import importlib.metadata
import json

import pytest

from dflash_jax.compare import Comparison
from dflash_jax.config import Config, ConfigError, DecodeConfig
from dflash_jax.session import Completion
from eval import plots, records, sweep, tables
from eval.protocol import CONVENTIONS

KEYS = (
  "prompts",
  "rule",
  "drafter_bytes",
  "guarantee",
  "width",
  "tau_per_request",
  "tau_per_round",
  "acceptance_per_position",
  "histogram",
  "plain_tokens_per_s",
  "speculative_tokens_per_s",
  "speedup",
  "identical_fraction",
  "config",
  "versions",
  "machine",
  "date",
  "conventions",
)


def reply(tokens, accepted, *, seconds=0.1, width=2.0):
  """A reply with `tokens` tokens after the first, at so many seconds each."""
  rounds = sum(accepted)
  return Completion(
    text="",
    tokens=[0] * (tokens + 1),
    slots=[0] * (tokens + 1),
    prompt_tokens=3,
    rounds=rounds,
    tau=tokens / rounds,
    accepted=accepted,
    width=width,
    ttft_s=0.5,
    tpot_s=seconds,
    tokens_per_s=1 / seconds,
  )


def compared(*replies, guarantee="tokens"):
  """The replies, each against a plain one of 0.15 s per token."""
  return [
    Comparison(ours, reply(len(ours.tokens) - 1, [9], seconds=0.15), guarantee)
    for ours in replies
  ]


@pytest.fixture
def record():
  """The record of two made-up replies."""
  replies = compared(
    reply(6, [1, 0, 2], width=1.0), reply(3, [1, 1, 0], width=3.5)
  )
  return records.to_record(Config(name="made up"), 2, "coupled", replies)


@pytest.fixture
def sweep_record():
  """Two lines: greedy, faster and slower than plain; then all that may be."""
  lines = (
    "width=fixed:1,fixed:3",
    "temperature=1 rule=token,typical,block tree_nodes=0,8",
  )
  points = sweep.parse(lines, DecodeConfig())
  fast, slow, token, tree, typical, *refused = points
  ours = {
    fast: ("greedy", "tokens", 0.1),
    slow: ("greedy", "tokens", 0.3),
    token: ("token", "law", 0.12),
    tree: ("token", "law", 0.12),
    typical: ("typical", "none", 0.05),
  }
  results = [
    sweep.Result(
      point,
      rule,
      compared(reply(6, [1, 2], seconds=seconds), guarantee=guarantee),
    )
    for point, (rule, guarantee, seconds) in ours.items()
  ]
  results += [sweep.Result(p, refusal="chains only") for p in refused]
  return records.to_sweep_record(Config(name="made up"), 2, results)


def test_record_has_every_key_and_survives_json(record, tmp_path):
  path = tmp_path / "new" / "results.json"
  records.write_json(str(path), record)
  loaded = json.loads(path.read_text())
  assert set(KEYS) <= loaded.keys()
  assert loaded["prompts"] == 2
  assert loaded["histogram"] == [2, 1, 2]
  assert loaded["config"]["name"] == "made up"
  assert loaded["machine"]["cores"] >= 1
  assert loaded["rule"] == "coupled"
  assert loaded["guarantee"] == "tokens"
  assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_table_shows_the_main_numbers(record):
  table = tables.to_table(record)
  for text in ("1.750", "1.800", "6.7", "10.0", "1.50x", "100.0%", "60.0%"):
    assert text in table
  assert "the tokens of plain decoding with the same seed" in table


def test_the_drafters_weights_stand_beside_the_cache_of_a_known_gpu(record):
  assert "L2" not in tables.to_table(record)
  machine = record["machine"] | {"l2_bytes": 50 * 2**20}
  table = tables.to_table(
    record | {"drafter_bytes": 3 * 2**19, "machine": machine}
  )
  assert "1.5 MiB" in table and "50.0 MiB" in table


def test_mean_width_is_over_rounds_not_replies(record):
  # Three rounds of 1 draft and two of 3.5.
  assert record["width"] == pytest.approx(2.0)
  assert "drafts verified per round" in tables.to_table(record)


def test_lossy_replies_are_called_lossy():
  replies = compared(reply(6, [1, 2]), guarantee="none")
  record = records.to_record(Config(), 1, "typical", replies)
  assert "LOSSY" in tables.to_table(record)


def test_histogram_is_said_to_go_as_far_as_a_round_can_accept():
  assert "0..D" in CONVENTIONS["histogram"]


def test_sweep_record_has_each_point_and_survives_json(sweep_record, tmp_path):
  path = tmp_path / "sweep.json"
  records.write_json(str(path), sweep_record)
  loaded = json.loads(path.read_text())
  assert {"prompts", "config", "versions", "machine", "date"} <= loaded.keys()
  assert set(CONVENTIONS) < loaded["conventions"].keys()
  points = loaded["points"]
  assert len(points) == 8
  assert points[0]["settings"] == {"width": "fixed:1"}
  assert points[0]["decode"]["width"] == "fixed:1"
  assert points[0]["speedup"] == pytest.approx(1.5)
  assert points[3]["line"].startswith("temperature=1 rule=token")
  assert [p.get("refused") for p in points[4:]] == [None, *3 * ["chains only"]]
  outside = {"prompts", "config", "versions", "machine", "date", "conventions"}
  outside |= {"drafter_bytes"}
  assert set(KEYS) - outside <= points[0].keys()


def test_sweep_table_has_a_row_a_point_in_order(sweep_record):
  head, *rows = tables.to_sweep_table(sweep_record).splitlines()
  assert head.split()[:4] == ["width", "temp", "rule", "tree"]
  assert rows[0].startswith("fixed:1") and "1.50x" in rows[0]
  assert rows[1].startswith("fixed:3") and "0.50x" in rows[1]
  assert "token" in rows[3] and "8" in rows[3].split()
  assert all("refused: chains only" in row for row in rows[5:8])
  assert rows[8] == ""


def test_sweep_table_marks_the_best_that_is_not_lossy(sweep_record):
  rows = tables.to_sweep_table(sweep_record).splitlines()
  assert [row for row in rows if row.endswith("*")] == [rows[1]]
  assert rows[5].endswith("LOSSY") and "3.00x" in rows[5]


def test_sweep_of_refused_points_alone_is_shown(sweep_record, tmp_path):
  points = [p for p in sweep_record["points"] if "refused" in p]
  refused = {**sweep_record, "points": points}
  table = tables.to_sweep_table(refused)
  assert table.count("refused: chains only") == 3
  path = tmp_path / "plot.png"
  plots.write_sweep_plot(str(path), refused)
  assert path.read_bytes().startswith(b"\x89PNG")


def test_sweep_plot_shows_every_measured_point(sweep_record, tmp_path):
  path, fewer = tmp_path / "new" / "all.png", tmp_path / "fewer.png"
  plots.write_sweep_plot(str(path), sweep_record)
  assert path.read_bytes().startswith(b"\x89PNG")
  assert path.stat().st_size > 20_000
  one_less = copy.deepcopy(sweep_record)
  del one_less["points"][1]
  plots.write_sweep_plot(str(fewer), one_less)
  assert fewer.read_bytes() != path.read_bytes()


def test_unwritable_place_is_named(record, sweep_record, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot write .*--json_out"):
    records.write_json(str(tmp_path / "file" / "x.json"), record)
  with pytest.raises(ConfigError, match="cannot write .*--plot_out"):
    plots.write_plot(str(tmp_path / "file" / "x.png"), record)
  with pytest.raises(ConfigError, match="cannot write .*--plot_out"):
    plots.write_sweep_plot(str(tmp_path / "file" / "x.png"), sweep_record)


def test_plot_is_a_png(record, tmp_path):
  path = tmp_path / "plot.png"
  plots.check_plot(str(path))
  plots.write_plot(str(path), record)
  assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  with pytest.raises(ConfigError, match=r"pip install 'dflash-jax\[eval\]'"):
    plots.check_plot("plot.png")


def test_plot_must_be_a_png():
  with pytest.raises(ConfigError, match="must end in .png"):
    plots.check_plot("plot.jpg")


def test_another_drafter_under_the_same_name_is_known(tmp_path):
  found = set()
  for names, text in ((("a", "b"), "x"), (("a", "c"), "x"), (("a", "b"), "y")):
    directory = tmp_path / f"{names}{text}"
    directory.mkdir()
    for name in names:
      (directory / name).write_text(text)
    found.add(records.digest_files(str(directory)))
    assert records.digest_files(str(directory)) in found
  assert len(found) == 3
  assert records.digest_files("ngram") == ""
