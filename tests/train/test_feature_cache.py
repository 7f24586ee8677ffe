"""Features on disk: those of the target, whole, and of this corpus."""

import dataclasses
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from configs.tiny import get_config
from tests.train.conftest import train_steps
from train import feature_cache
from train.corpus import Corpus
from train.corpus_writer import CorpusWriter, Example
from train.feature_cache import FeatureCache, measure_tap_scale
from train.files import FileError
from train.setup import Setup
from train.step import Trainer

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
  expected = jax.jit(setup.trainer.learner.taps)(setup.target_params, online)
  lengths = np.minimum(setup.corpus.lengths[indices], online.tokens.shape[1])
  for row, length in enumerate(lengths):
    np.testing.assert_allclose(
      offline.taps[row, :length], expected[row, :length], **HALF
    )
    assert not np.asarray(offline.taps[row, length:]).any()


def rows_of(path: pathlib.Path) -> np.ndarray:
  return np.fromfile(path / "features.f16", np.float16).astype(np.float32)


def marks_of(path: pathlib.Path) -> np.ndarray:
  return np.fromfile(path / "done.u64", np.uint64)


def test_training_from_the_cache_is_training_online(setup, directory):
  _, online = train_steps(setup, 3)
  _, offline = train_steps(cached(setup, directory), 3)
  for first, second in zip(online, offline, strict=True):
    assert first["loss"] == pytest.approx(second["loss"], rel=2e-3)
    assert first["slots"] == second["slots"]


def test_a_killed_build_ends_in_the_bits_of_one_that_was_not(
  setup, tmp_path, small_batches, monkeypatch
):
  target, params = setup.trainer.target, setup.target_params
  whole = open_cache(tmp_path / "whole", setup)
  whole.build(target, params)
  cache = open_cache(tmp_path / "killed", setup)
  compute, calls = FeatureCache._compute, []

  def killed(self, *arguments):
    if len(calls) == 2:
      raise KeyboardInterrupt
    calls.append(arguments)
    return compute(self, *arguments)

  monkeypatch.setattr(FeatureCache, "_compute", killed)
  with pytest.raises(KeyboardInterrupt):
    cache.build(target, params)
  monkeypatch.setattr(FeatureCache, "_compute", compute)
  assert np.count_nonzero(marks_of(tmp_path / "killed")) == 10
  again = open_cache(tmp_path / "killed", setup)
  assert not again.is_complete
  again.build(target, params)
  for read in (rows_of, marks_of):
    both = (read(tmp_path / name) for name in ("whole", "killed"))
    np.testing.assert_array_equal(*both)


def test_rows_that_were_written_but_not_marked_do_not_count(
  setup, directory, tmp_path, small_batches, monkeypatch
):
  cache = open_cache(tmp_path, setup)

  def killed(self, marks):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(FeatureCache, "_record", killed)
    with pytest.raises(KeyboardInterrupt):
      cache.build(setup.trainer.target, setup.target_params)
  assert rows_of(tmp_path).any()
  again = open_cache(tmp_path, setup)
  longest = int(np.argmax(setup.corpus.lengths))
  with pytest.raises(FileError, match=f"lacks .* of example {longest}"):
    again.batch(np.array([longest]), 47)


# --- Hybrid -------------------------------------------------------------------


def hybrid(setup, directory):
  """The setup, filling the cache as it reads."""
  config = dataclasses.replace(
    setup.trainer.config, feature_cache=str(directory), hybrid_features=True
  )
  trainer = Trainer.create(setup.trainer.target, setup.trainer.drafter, config)
  cache = open_cache(directory, setup)
  return dataclasses.replace(setup, trainer=trainer, cache=cache)


def test_hybrid_features_are_computed_as_they_are_read_and_kept(
  setup, directory, tmp_path, monkeypatch
):
  reader = hybrid(setup, tmp_path)
  indices = np.array([7, 0, 3])
  first = reader.batch(indices)
  assert np.flatnonzero(marks_of(tmp_path)).tolist() == [0, 3, 7]
  expected = cached(setup, directory).batch(indices)
  # Other batch sizes round otherwise, within half precision.
  np.testing.assert_allclose(first.taps, expected.taps, **HALF)

  computed = []
  compute = FeatureCache._compute

  def watched(self, target, params, group, size):
    computed.extend(group.tolist())
    return compute(self, target, params, group, size)

  monkeypatch.setattr(FeatureCache, "_compute", watched)
  again = hybrid(setup, tmp_path).batch(np.array([3, 5, 7, 0]))
  assert computed == [5]
  np.testing.assert_array_equal(np.asarray(again.taps)[[2, 3, 0]], first.taps)


def test_hybrid_features_do_not_depend_on_who_asked_first(setup, tmp_path):
  orders = {"alone": [[4], [9], [2]], "together": [[2, 4, 9]]}
  for name, batches in orders.items():
    reader = hybrid(setup, tmp_path / name)
    for indices in batches:
      reader.batch(np.array(indices))
  both = (rows_of(tmp_path / name) for name in orders)
  np.testing.assert_array_equal(*both)


def test_a_hybrid_cache_can_be_completed_before_the_next_run(
  setup, directory, tmp_path, monkeypatch
):
  kept = hybrid(setup, tmp_path).batch(np.array([7]))
  write, written = FeatureCache._write, []

  def watched(self, first, data):
    written.append(first)
    write(self, first, data)

  monkeypatch.setattr(FeatureCache, "_write", watched)
  cache = open_cache(tmp_path, setup)
  cache.build(setup.trainer.target, setup.target_params)
  starts = {setup.corpus.span(index).start for index in range(13)}
  assert {*written} == starts - {setup.corpus.span(7).start}
  assert open_cache(tmp_path, setup).is_complete
  again = cached(setup, tmp_path).batch(np.array([7]))
  np.testing.assert_array_equal(again.taps, kept.taps)
  np.testing.assert_allclose(rows_of(tmp_path), rows_of(directory), **HALF)


# --- Refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "what"),
  [
    ({"taps": (1, 2)}, r"taps \[0, 2\], now \[1, 2\]"),
    ({"source": {**SOURCE, "dtype": "bfloat16"}}, "dtype 'float32', now 'bfl"),
    ({"source": {**SOURCE, "target": "another"}}, "target 'tests', now 'ano"),
    ({"source": {**SOURCE, "weights": "f00d"}}, "weights None, now 'f00d'"),
  ],
)
def test_features_of_something_else_are_refused(
  setup, directory, changes, what
):
  with pytest.raises(FileError, match=rf"other features \({what}.*\); choose"):
    open_cache(directory, setup, **changes)


def test_a_run_refuses_features_of_other_weights(corpus_directory, tmp_path):
  config = get_config()
  config.train = dataclasses.replace(
    config.train, corpus=(corpus_directory,), feature_cache=str(tmp_path)
  )
  assert Setup.create(config).cache.is_complete
  meta = json.loads((tmp_path / "meta.json").read_text())
  # As of a checkpoint of the same name that was trained on.
  (tmp_path / "meta.json").write_text(json.dumps(meta | {"weights": "f00d"}))
  with pytest.raises(FileError, match=r"\(weights 'f00d', now '\w+'\)"):
    Setup.create(config)


def test_features_of_another_corpus_are_refused(setup, directory, tmp_path):
  example = Example(np.arange(9, dtype=np.int32), 2, held_out=False)
  CorpusWriter(tmp_path, {}).add_shard([example], {})
  with pytest.raises(FileError, match="other features .corpus "):
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


def test_a_damaged_row_is_named_as_it_is_first_read(setup, directory, tmp_path):
  path = copy_cache(directory, tmp_path) / "features.f16"
  data = bytearray(path.read_bytes())
  row = setup.corpus.span(7).start
  data[row * 2 * 48] ^= 1  # one bit, of one of the 48 channels
  path.write_bytes(data)
  reader = cached(setup, tmp_path)
  reader.batch(np.array([6, 8]))
  with pytest.raises(FileError, match=r"f16 is damaged: example 7 .* delete"):
    reader.batch(np.array([8, 7]))


def test_the_bytes_are_said_before_anything_is_written(
  setup, tmp_path, monkeypatch
):
  said = []

  def info(text, *arguments):
    said.append((text % arguments, (tmp_path / "new").exists()))

  monkeypatch.setattr(feature_cache.logging, "info", info)
  open_cache(tmp_path / "new", setup)
  tokens = setup.corpus.num_tokens
  ((text, existed),) = said
  assert f"{tokens} tokens x 48 values x 2 bytes = " in text and "free" in text
  assert not existed
  open_cache(tmp_path / "new", setup)
  assert len(said) == 1


def test_a_disk_without_room_for_all_of_it_is_told_with_numbers(
  setup, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    feature_cache.shutil,
    "disk_usage",
    lambda path: types.SimpleNamespace(free=1e4),
  )
  cache = open_cache(tmp_path, setup)
  with pytest.raises(FileError, match=r"needs 0.00 GB more, .* 0.00 GB free"):
    cache.build(setup.trainer.target, setup.target_params)
  hybrid(setup, tmp_path).batch(np.array([7]))  # takes what it needs


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
    lambda *_: np.full((32, 64, 48), value, np.float32),
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
