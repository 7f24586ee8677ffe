"""Reports: every key, a readable table, files that are whole."""

import importlib.metadata
import json

import pytest

from dflash_jax.config import Config, ConfigError
from eval import acceptance, report, speed
from tests.eval.test_acceptance import completion

KEYS = (
  "prompts",
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


@pytest.fixture
def record():
  """The record of two made-up replies."""
  return report.to_record(
    Config(name="made up"),
    2,
    acceptance.summarize([completion(6, [1, 0, 2]), completion(3, [1, 1, 0])]),
    speed.Speed(40.0, 60.0, 1.5, 0.2, 0.25, 0.5),
  )


def test_record_has_every_key_and_survives_json(record, tmp_path):
  path = tmp_path / "new" / "results.json"
  report.write_json(str(path), record)
  loaded = json.loads(path.read_text())
  assert set(KEYS) <= loaded.keys()
  assert loaded["prompts"] == 2
  assert loaded["histogram"] == [2, 1, 2]
  assert loaded["config"]["name"] == "made up"
  assert loaded["machine"]["cores"] >= 1
  assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_table_shows_the_main_numbers(record):
  table = report.to_table(record)
  for text in ("1.750", "1.800", "40.0", "60.0", "1.50x", "50.0%", "60.0%"):
    assert text in table


def test_unwritable_place_is_named(record, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot write .*--json_out"):
    report.write_json(str(tmp_path / "file" / "x.json"), record)
  with pytest.raises(ConfigError, match="cannot write .*--plot_out"):
    report.write_plot(str(tmp_path / "file" / "x.png"), record)


def test_plot_is_a_png(record, tmp_path):
  path = tmp_path / "plot.png"
  report.check_plot(str(path))
  report.write_plot(str(path), record)
  assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_names_the_extra(monkeypatch):
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  with pytest.raises(ConfigError, match=r"pip install 'dflash-jax\[eval\]'"):
    report.check_plot("plot.png")


def test_plot_must_be_a_png():
  with pytest.raises(ConfigError, match="must end in .png"):
    report.check_plot("plot.jpg")
