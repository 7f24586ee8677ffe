"""A tiny target, a corpus of its own greedy answers, and a trained drafter."""

import contextlib
import dataclasses
import pathlib
import resource
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dflash_jax.config import TargetConfig, TrainConfig
from dflash_jax.decode import Decoder
from dflash_jax.drafters import DFlash, Eagle3, LanguageModel, NoDrafter
from dflash_jax.model import Model, borrow
from dflash_jax.networks import Eagle3Config
from dflash_jax.proposal import Drafting
from dflash_jax.session import Session
from tests.testing import BLOCK_SIZE, tiny_drafter_config, tiny_model
from train.corpus import Corpus
from train.corpus_writer import CorpusWriter, Example
from train.design import Trainable
from train.setup import Setup
from train.state import TrainState
from train.step import Trainer
from train.sums import summarize

ANSWER_TOKENS = 31  # longest answer; shorter ones end in a stop token
STOP_IDS = (5, 23, 61)
HELD_OUT = 3  # the last sequences of the corpus
TRAINING = TrainConfig(
  steps=240,
  batch_size=4,
  sequence_length=47,
  num_anchors=7,
  learning_rate=2e-2,
  loss_chunk=64,
  compute_dtype="float32",
  evaluate_sequences=16,
)


@pytest.fixture(scope="session")
def model() -> Model:
  """A target whose answers end, without a drafter."""
  return tiny_model(drafter=False, eos_ids=STOP_IDS)


def greedy_answers(
  model: Model, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
  """What the target answers, one batch."""
  session = Session(
    model=model,
    decoder=Decoder(
      model.target, NoDrafter(), Drafting(0), stop_ids=model.stop_ids
    ),
    batch=len(prompts),
    capacity=32 + max_new_tokens,
    max_new_tokens=max_new_tokens,
  )
  replies = session.reply(prompts, [max_new_tokens] * len(prompts))
  return [reply.tokens for reply in replies]


@pytest.fixture(scope="session")
def corpus_directory(model, tmp_path_factory) -> str:
  """Thirteen sequences of unequal lengths, answered greedily."""
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, 94, size=3 + i).tolist() for i in range(13)]
  answers = greedy_answers(model, prompts, ANSWER_TOKENS)
  examples = [
    Example(
      tokens=np.array(prompt + answer, np.int32),
      prompt_length=len(prompt),
      held_out=index >= len(prompts) - HELD_OUT,
    )
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
  ]
  directory = tmp_path_factory.mktemp("corpus")
  writer = CorpusWriter(directory, {"made by": "tests"})
  writer.add_shard(examples[:6], {"kept": 6})
  writer.add_shard(examples[6:], {"kept": 7})
  writer.finish({"prompts": 13, "duplicates": 0})
  return str(directory)


@pytest.fixture(scope="session")
def corpus(corpus_directory) -> Corpus:
  """The corpus, read."""
  return Corpus([corpus_directory])


def make_setup(
  model: Model,
  corpus: Corpus,
  head_ids: np.ndarray | None = None,
  parts: dict[str, Any] | None = None,
  drafter: Trainable | None = None,
  **overrides,
) -> Setup:
  """A Setup around the tiny target, float32, online features.

  Args:
    model: the target.
    corpus: of its answers.
    head_ids: a draft vocabulary.
    parts: of a tiny DFlash drafter.
    drafter: instead of it.
    **overrides: fields of TrainConfig.
  """
  if drafter is None:
    drafter = DFlash(tiny_drafter_config(model.target.config, **(parts or {})))
  settings = dataclasses.replace(TRAINING, **overrides)
  return Setup(
    trainer=Trainer.create(model.target, drafter, settings),
    target_params=model.params.target,
    borrowed=borrow(model.params.target, head_ids),
    corpus=corpus,
    cache=None,
    head_ids=head_ids,
  )


def make_baseline(name: str, target: TargetConfig, columns: int | None = None):
  """A tiny "eagle3", with a head of so many columns, or a tiny "lm"."""
  if name == "eagle3":
    network = Eagle3Config(
      width=target.width,
      mlp_width=34,
      num_heads=4,
      num_kv_heads=2,
      head_width=6,
      vocab_size=target.vocab_size,
      draft_vocab_size=columns or target.vocab_size,
      target_layer_ids=(0, 2),
      target_width=target.width,
      rotary_base=target.rotary_base,
    )
    return Eagle3(network, BLOCK_SIZE - 1)
  network = dataclasses.replace(target, num_layers=2, mlp_width=22)
  return LanguageModel(network, BLOCK_SIZE - 1, borrows=True)


@pytest.fixture(scope="session")
def setup(model, corpus) -> Setup:
  """What the drafter trains on and with."""
  return make_setup(model, corpus)


def train_steps(
  setup: Setup, steps: int
) -> tuple[TrainState, list[dict[str, jax.Array]]]:
  """A fresh drafter after some steps, and the metrics of each."""
  columns = None if setup.head_ids is None else len(setup.head_ids)
  state = setup.trainer.init_state(
    jax.random.key(1), setup.tap_scale(), columns
  )
  history = []
  for step in range(steps):
    state, sums, norms = setup.trainer.update(
      state, setup.target_params, setup.borrowed, setup.train_batch(step)
    )
    history.append(summarize(sums) | norms)
  return state, jax.device_get(history)


@pytest.fixture(scope="session")
def trained(setup) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
  """A drafter that has learned its corpus by heart, and how it went."""
  return train_steps(setup, TRAINING.steps)


def copy(tree):
  """The same arrays again: `update` donates the ones it is given."""
  return jax.tree.map(jnp.copy, tree)


@pytest.fixture
def small_files():
  """A context in which files beyond some bytes fail, as on a full disk."""

  @contextlib.contextmanager
  def limit(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
      yield
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

  return limit


@pytest.fixture(scope="package", autouse=True)
def compiled(tmp_path_factory) -> Iterator[pathlib.Path]:
  """Compiled code that the tests share with the programs they run.

  That of `make test`, if it is make that runs them.
  """
  kept = jax.config.jax_compilation_cache_dir
  path = pathlib.Path(kept or tmp_path_factory.mktemp("compiled"))
  settings = {
    "jax_compilation_cache_dir": str(path),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield path
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
