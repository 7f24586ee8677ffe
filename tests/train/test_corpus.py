"""Corpora: what is written is read back, and nothing else is."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dflash_jax.config import ConfigError, TargetSource
from tests.testing import tiny_target_config
from train.corpus import (
  Corpus,
  CorpusError,
  identify_target,
  identify_weights,
  spread,
)
from train.corpus_writer import CorpusWriter, Example, is_held_out
from train.files import FileError

SETTINGS = {"openings": ("", "How"), "seed": 3}


def example(tokens, prompt_length, held_out=False) -> Example:
  return Example(np.array(tokens, np.int32), prompt_length, held_out)


EXAMPLES = [
  example([5, 6, 7, 8, 9], 2),
  example([1, 2, 3], 1, held_out=True),
  example([7, 7, 7, 8, 8, 2, 9], 3),
]


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
  """A complete corpus of two shards."""
  writer = CorpusWriter(tmp_path / "corpus", SETTINGS)
  writer.add_shard(EXAMPLES[:2], {"kept": 2, "empty": 1})
  writer.add_shard(EXAMPLES[2:], {"kept": 1, "empty": 4})
  writer.finish({"prompts": 9, "duplicates": 1})
  return tmp_path / "corpus"


def read(*directories) -> Corpus:
  return Corpus([str(directory) for directory in directories])


# --- Contents -----------------------------------------------------------------


def test_examples_are_read_back_with_masks_and_splits(directory):
  corpus = read(directory)
  assert len(corpus) == 3 and corpus.num_tokens == 15
  for index, expected in enumerate(EXAMPLES):
    tokens, mask = corpus.example(index)
    np.testing.assert_array_equal(tokens, expected.tokens)
    assert mask.argmax() == expected.prompt_length and mask[-1]
  assert corpus.train.tolist() == [0, 2]
  assert corpus.held_out.tolist() == [1]


def test_several_corpora_are_one_behind_the_other(directory, tmp_path):
  other = CorpusWriter(tmp_path / "other", {})
  other.add_shard(EXAMPLES[:1], {})
  other.finish({})
  corpus = read(directory, tmp_path / "other")
  np.testing.assert_array_equal(corpus.example(3)[0], EXAMPLES[0].tokens)
  assert corpus.checksum != read(directory).checksum
  assert corpus.checksum != read(tmp_path / "other", directory).checksum


def test_batches_are_cut_and_padded(directory):
  tokens, mask = read(directory).batch(np.array([1, 2]), 5)
  assert tokens.tolist() == [[1, 2, 3, 0, 0], [7, 7, 7, 8, 8]]
  assert mask.astype(int).tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]


def test_frequent_tokens_count_training_answers_alone(directory):
  # Answers 7 8 9 and 8 8 2 9: three 8, two 9, then 2 and 7.
  corpus = read(directory)
  assert corpus.frequent_tokens(2, 20).tolist() == [8, 9]
  assert corpus.frequent_tokens(4, 20).tolist() == [2, 7, 8, 9]
  assert corpus.frequent_tokens(6, 20).tolist() == [0, 1, 2, 7, 8, 9]
  with pytest.raises(ConfigError, match="draft_vocabulary=21 exceeds .* 20"):
    corpus.frequent_tokens(21, 20)


def test_each_epoch_is_another_permutation_of_the_training_split(tmp_path):
  writer = CorpusWriter(tmp_path, {})
  writer.add_shard([example([i, i], 1, i % 5 == 0) for i in range(20)], {})
  corpus = read(tmp_path)
  steps = [corpus.train_indices(step, 3, seed=1) for step in range(16)]
  flat = np.concatenate(steps)  # three epochs of sixteen
  epochs = flat.reshape(3, 16)
  for epoch in epochs:
    assert sorted(epoch) == corpus.train.tolist()
  assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()
  again = corpus.train_indices(7, 3, seed=1)
  np.testing.assert_array_equal(again, steps[7])
  assert (corpus.train_indices(7, 3, seed=2) != again).any()


def test_a_spread_takes_its_share_of_everything():
  indices = np.arange(10, 30)
  assert spread(indices, 4).tolist() == [10, 15, 20, 25]
  assert spread(indices, 7).size == 7
  np.testing.assert_array_equal(spread(indices, 20), indices)
  np.testing.assert_array_equal(spread(indices, 99), indices)


def test_the_held_out_split_hangs_on_the_prompt_alone():
  prompts = [f"prompt {i}" for i in range(4000)]
  share = np.mean([is_held_out(prompt, 0.1) for prompt in prompts])
  assert 0.08 < share < 0.12  # three standard deviations are 0.014
  assert is_held_out(" prompt 1\n", 0.5) == is_held_out("prompt 1", 0.5)
  assert not any(is_held_out(prompt, 0.0) for prompt in prompts)
  assert all(is_held_out(prompt, 1.0) for prompt in prompts)


def test_random_targets_are_told_apart():
  first, second = tiny_target_config(), tiny_target_config(mlp_width=37)
  identities = [
    identify_target(TargetSource(path="models/x")),
    identify_target(TargetSource(random=first)),
    identify_target(TargetSource(random=second)),
    identify_target(TargetSource(random=first, seed=1)),
  ]
  assert len({json.dumps(identity) for identity in identities}) == 4


# --- Resuming -----------------------------------------------------------------


def test_weights_are_told_apart_whatever_was_changed():
  rng = np.random.default_rng(0)
  matrices = [jnp.asarray(rng.normal(size=(37, 41))) for _ in range(2)]
  scale = jnp.ones(41)
  params = {"layers": matrices, "norm": scale}
  same = jax.tree.map(jnp.copy, params)
  assert identify_weights(params) == identify_weights(same)
  nudged = jax.tree.map(lambda leaf: leaf * (1 + 1e-6), params)
  rounded = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
  other = {**params, "norm": 2 * scale}
  swapped = {**params, "layers": matrices[::-1]}
  found = [nudged, rounded, other, swapped, params]
  assert len({identify_weights(each) for each in found}) == 5


def test_a_corpus_is_continued_where_its_index_ends(tmp_path):
  first = CorpusWriter(tmp_path, SETTINGS)
  first.add_prompts(["one", "two\nlines"], {"drawn": 3})
  first.add_shard(EXAMPLES[:2], {"kept": 2})
  again = CorpusWriter(tmp_path, SETTINGS)
  assert again.read_prompts() == ["one", "two\nlines"]
  assert len(again.index["shards"]) == 1
  again.add_shard(EXAMPLES[2:], {"kept": 1})
  assert len(read(tmp_path)) == 3


def test_files_that_the_index_does_not_name_are_not_read(directory):
  shard = directory / "shard-00001.safetensors"
  shutil.copy(shard, directory / "shard-00002.safetensors")
  (directory / "shard-00003.safetensors.partial").write_bytes(b"half")
  assert len(read(directory)) == 3


def test_totals_add_up_the_counts(directory):
  index = json.loads((directory / "index.json").read_text())
  assert index["complete"]
  assert index["totals"] == {
    "self_written": {},
    "merged": {"prompts": 9, "duplicates": 1},
    "answered": {"kept": 3, "empty": 5},
  }


def test_other_settings_are_refused_by_name(directory):
  with pytest.raises(CorpusError, match=r"seed: 3, now 4.*choose another"):
    CorpusWriter(directory, {**SETTINGS, "seed": 4})


# --- Bad input ----------------------------------------------------------------


def test_a_directory_without_corpus_is_named(tmp_path):
  with pytest.raises(CorpusError, match="no corpus given"):
    read()
  with pytest.raises(CorpusError, match=r"nowhere holds no corpus.*synthesize"):
    read(tmp_path / "nowhere")


def test_a_corpus_without_shards_is_refused(tmp_path):
  CorpusWriter(tmp_path, SETTINGS).add_prompts(["one"], {})
  with pytest.raises(CorpusError, match="no shard yet"):
    read(tmp_path)


def test_a_corpus_of_held_out_examples_alone_is_refused(tmp_path):
  CorpusWriter(tmp_path, SETTINGS).add_shard(EXAMPLES[1:2], {})
  with pytest.raises(CorpusError, match="no training sequences"):
    read(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_shard_is_named(directory, damage):
  path = directory / "shard-00001.safetensors"
  data = path.read_bytes()
  if damage == "cut":
    path.write_bytes(data[:-1])
  elif damage == "flip":
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  else:
    path.unlink()
  with pytest.raises(CorpusError, match=r"shard-00001.*run train.synthesize"):
    read(directory)


@pytest.mark.parametrize(
  "change",
  [
    {"tokens": np.zeros((4,), np.float32)},
    {"offsets": np.array([0, 9], np.int64)},
    {"offsets": np.array([0, 3, 2, 4], np.int64)},
    {"loss_mask": np.zeros((3,), np.uint8)},
    {"held_out": np.zeros((2,), np.uint8)},
    {"tokens": None},
  ],
)
def test_a_shard_that_contradicts_itself_is_refused(tmp_path, change):
  """Its checksum holds: somebody wrote it so."""
  writer = CorpusWriter(tmp_path, SETTINGS)
  writer.add_shard([example([1, 2, 3, 4], 1)], {})
  path = tmp_path / "shard-00000.safetensors"
  tensors = safetensors.numpy.load(path.read_bytes()) | change
  data = safetensors.numpy.save(
    {name: value for name, value in tensors.items() if value is not None}
  )
  writer.index["shards"].clear()
  writer._add("shards", path.name, data, {})
  with pytest.raises(CorpusError, match="shard-00000"):
    read(tmp_path)


@pytest.mark.parametrize(
  "text",
  [
    "{",
    "[]",
    "\xff",
    json.dumps({"format": 2}),
    json.dumps({"format": 1}),
    json.dumps(
      {
        "format": 1,
        "settings": {},
        "complete": True,
        "prompts": [],
        "shards": [{"file": "../../etc/passwd", "sha256": ""}],
      }
    ),
  ],
)
def test_a_damaged_index_is_named(directory, text):
  (directory / "index.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(FileError, match=r"index\.json"):
    read(directory)
  with pytest.raises(FileError, match=r"index\.json"):
    CorpusWriter(directory, SETTINGS)


def test_a_token_outside_the_vocabulary_is_named(directory):
  corpus = read(directory)
  corpus.check_vocabulary(10)
  with pytest.raises(CorpusError, match="token 9, but .* vocabulary is 9"):
    corpus.check_vocabulary(9)


@pytest.mark.parametrize(
  ("length", "most"),
  [(7, 3), (99, 3), (6, 2), (5, 2), (4, 1)],
)
def test_anchors_that_no_training_answer_can_hold_are_refused(
  directory, length, most
):
  # Answers of three and four tokens; an anchor needs a token after it.
  corpus = read(directory)
  corpus.check_anchors(most, length)
  with pytest.raises(
    ConfigError, match=rf"num_anchors={most + 1} .* is {most}, cut .*={length}"
  ):
    corpus.check_anchors(most + 1, length)


def test_a_full_disk_keeps_the_corpus_as_it_was(directory, small_files):
  before = {path: path.read_bytes() for path in directory.iterdir()}
  writer = CorpusWriter(directory, SETTINGS)
  large = example(np.arange(5000), 1)
  with small_files(4096), pytest.raises(FileError, match="cannot write .*sh"):
    writer.add_shard([large], {})
  assert {p: p.read_bytes() for p in directory.iterdir()} == before
  again = CorpusWriter(directory, SETTINGS)
  again.add_shard([large], {})
  assert len(read(directory)) == 4


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(FileError, match="cannot create directory"):
    CorpusWriter(tmp_path / "file" / "corpus", SETTINGS)
