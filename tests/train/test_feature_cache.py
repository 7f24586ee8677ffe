"""Features on disk: those of the target, whole, and of this corpus."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from tests.train.conftest import train_steps
from train import feature_cache
from train.corpus import Corpus
from train.corpus_writer import CorpusWriter, Example
from train.feature_cache import FeatureCache, measure_tap_scale
from train.files import FileError

SOURCE = {"target": "tests", "dtype": "float32"}
HALF = {"rtol": 2**-10, "atol": 2**-10}  # a float16 has eleven bits


def open_cache(directory, setup, **changes) -> FeatureCache:
  taps = setup.trainer.drafter.taps
  arguments = {
    "corpus": setup.corpus,
    "taps": taps,
    "width": len(taps) * setup.trainer.target.config.width,
    "source": SOURCE,
  }
  return FeatureCache(str(directory), **arguments | changes)


@pytest.fixture
def small_batches(monkeypatch):
  """Several passes even for a small corpus, each one recorded."""
  monkeypatch.setattr(feature_cache, "BATCH", 5)
  monkeypatch.setattr(feature_cache, "SAVE_EVERY", 1)


@pytest.fixture(scope="module")
def directory(setup, tmp_path_factory) -> pathlib.Path:
  """A complete cache."""
  path = tmp_path_factory.mktemp("features")
  cache = open_cache(path, setup)
  assert not cache.is_complete
  cache.build(setup.trainer.target, setup.target_params)
  return path


def cached(setup, directory):
  """The setup, reading its features from the cache."""
  cache = open_cache(directory, setup)
  assert cache.is_complete
  return dataclasses.replace(setup, cache=cache)


def test_cached_features_equal_online_ones(setup, directory):
  reader = cached(setup, directory)
  indices = np.array([0, 3, 7, 12])
  online, offline = setup.batch(indices), reader.batch(indices)
  np.testing.assert_array_equal(online.tokens, offline.tokens)
  expected = jax.jit(type(setup.trainer).taps, static_argnums=0)(
    setup.trainer, setup.target_params, online
  )
  lengths = np.minimum(setup.corpus.lengths[indices], online.tokens.shape[1])
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(
      offline.taps[row, :length], expected[row, :length], **HALF
    )
    assert not np.asarray(offline.taps[row, length:]).any()


def test_training_from_the_cache_is_training_online(setup, directory):
  _, online = train_steps(setup, 3)
  _, offline = train_steps(cached(setup, directory), 3)
  for first, second in zip(online, offline, strict=True):
    assert first["loss"] == pytest.approx(second["loss"], rel=2e-3)
    assert first["slots"] == second["slots"]


def test_a_killed_build_goes_on_where_it_was(
  setup, directory, tmp_path, small_batches, monkeypatch
):
  cache = open_cache(tmp_path, setup)
  compute, calls = FeatureCache._compute, []

  def killed(self, target, params, part):
    if len(calls) == 2:
      raise KeyboardInterrupt
    calls.append(part)
    compute(self, target, params, part)

  monkeypatch.setattr(FeatureCache, "_compute", killed)
  with pytest.raises(KeyboardInterrupt):
    cache.build(setup.trainer.target, setup.target_params)
  monkeypatch.setattr(FeatureCache, "_compute", compute)
  assert json.loads((tmp_path / "meta.json").read_text())["examples"] == 10
  again = open_cache(tmp_path, setup)
  assert not again.is_complete
  again.build(setup.trainer.target, setup.target_params)
  # Other batch sizes round otherwise, within half precision.
  rows = [
    np.fromfile(path / "features.f16", np.float16).astype(np.float32)
    for path in (tmp_path, directory)
  ]
  np.testing.assert_allclose(*rows, **HALF)


@pytest.mark.parametrize(
  "changes",
  [
    {"taps": (1, 2)},
    {"source": {**SOURCE, "dtype": "bfloat16"}},
    {"source": {**SOURCE, "target": "another"}},
  ],
)
def test_features_of_something_else_are_refused(setup, directory, changes):
  with pytest.raises(FileError, match=r"other features.*feature_cache or del"):
    open_cache(directory, setup, **changes)


def test_features_of_another_corpus_are_refused(setup, directory, tmp_path):
  example = Example(np.arange(9, dtype=np.int32), 2, held_out=False)
  CorpusWriter(tmp_path, {}).add_shard([example], {})
  with pytest.raises(FileError, match="caches other features"):
    open_cache(directory, setup, corpus=Corpus([str(tmp_path)]))


def copy_cache(directory, tmp_path) -> pathlib.Path:
  for path in directory.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def test_a_truncated_cache_is_named(setup, directory, tmp_path):
  path = copy_cache(directory, tmp_path) / "features.f16"
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(FileError, match=r"features\.f16 is missing or truncated"):
    open_cache(tmp_path, setup)
  path.unlink()
  with pytest.raises(FileError, match=r"features\.f16 is missing or truncated"):
    open_cache(tmp_path, setup)


def test_a_damaged_record_is_named(setup, directory, tmp_path):
  copy_cache(directory, tmp_path)
  (tmp_path / "meta.json").write_text("{")
  with pytest.raises(FileError, match=r"meta\.json is damaged"):
    open_cache(tmp_path, setup)


def test_a_full_disk_is_found_out_before_the_work(setup, tmp_path, small_files):
  with small_files(4096), pytest.raises(FileError, match=r"cannot write .*f16"):
    open_cache(tmp_path, setup)
  assert not (tmp_path / "features.f16").exists()
  assert not open_cache(tmp_path, setup).is_complete


@pytest.mark.parametrize("value", [np.nan, np.inf, 70000.0])
def test_a_feature_that_half_precision_cannot_hold_is_refused(
  setup, tmp_path, monkeypatch, value
):
  cache = open_cache(tmp_path, setup)
  monkeypatch.setattr(
    feature_cache,
    "_tap",
    lambda *_: np.full((feature_cache.BATCH, 64, 48), value, np.float32),
  )
  with pytest.raises(FileError, match="does not fit half precision"):
    cache.build(setup.trainer.target, setup.target_params)


def test_the_tap_scale_ignores_outliers_and_padding():
  rng = np.random.default_rng(0)
  taps = rng.normal(size=(4, 500, 3)) * [0.1, 1.0, 50.0]
  taps[:, 0] = 1e6  # a first token's
  valid = np.ones((4, 500), bool)
  valid[:, 400:] = False
  taps[:, 400:] = 0.0
  scale = measure_tap_scale(taps, valid)
  np.testing.assert_allclose(scale, [10, 1, 0.02], rtol=0.1)
  assert np.isfinite(measure_tap_scale(taps * 0, valid)).all()
