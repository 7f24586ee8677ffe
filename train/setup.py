"""What a run trains on and with: target, new drafter, corpus, features."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from dflash_jax.config import Config
from dflash_jax.drafters import Borrowed
from dflash_jax.model import borrow, load_target
from dflash_jax.target import Params, Target
from train import mesh as mesh_lib
from train.corpus import (
  Corpus,
  batch_order,
  identify_target,
  identify_weights,
  spread,
)
from train.design import design_drafter, make_drafter
from train.feature_cache import FeatureCache, measure_tap_scale
from train.packing import pack
from train.processes import take_turns, tell
from train.settings import check_settings
from train.state import Batch
from train.step import Trainer

SCALE_EXAMPLES = 32  # sequences that tell the usual size of each channel


def plan_trainer(config: Config, target: Target, corpus: Corpus) -> Trainer:
  """The step that a config asks for, refused if nobody could run it.

  Raises:
    ConfigError: drafter, loss, mesh and target do not fit.
    FileError: a corpus that does not fit them.
  """
  train = config.train
  mesh = mesh_lib.make_mesh(train)
  network = design_drafter(config, target.config)
  drafter = make_drafter(config.drafter, network)
  corpus.check_vocabulary(target.config.vocab_size)
  if config.drafter.name != "lm":  # which learns from every token
    corpus.check_anchors(train.num_anchors, train.sequence_length)
  return Trainer.create(target, drafter, train, mesh)


def open_cache(
  config: Config,
  corpus: Corpus,
  target: Target,
  params: Params,
  layers: tuple[int, ...],
) -> FeatureCache:
  """The feature cache of a config.

  Args:
    config: names its directory.
    corpus: what it caches.
    target: whose features they are. params: its own, in the compute dtype.
    layers: that are read.

  Raises:
    FileError: as FeatureCache.
  """
  source = {
    "target": identify_target(config.target),
    "weights": identify_weights(params),
    "dtype": config.train.compute_dtype,
  }
  width = len(layers) * target.config.width
  return FeatureCache(config.train.feature_cache, corpus, layers, width, source)


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything the loop needs besides its state.

  Attributes:
    trainer: the step.
    target_params: frozen.
    borrowed: the target's tables, in the compute dtype, head trimmed.
    corpus: tokens.
    cache: features on disk, or None for online features.
    head_ids: i32[V'], the draft vocabulary, or None.
  """

  trainer: Trainer
  target_params: Params
  borrowed: Borrowed
  corpus: Corpus
  cache: FeatureCache | None
  head_ids: np.ndarray | None

  @classmethod
  def create(cls, config: Config) -> "Setup":
    """Loads the target and the corpus and prepares features.

    Raises:
      ConfigError: settings nobody could train with.
      FileError: a corpus or feature cache that cannot be used.
      WeightsError: a target that cannot be loaded.
    """
    train = config.train
    check_settings(train)
    mesh_lib.make_mesh(train)  # refuses before the long work
    corpus = Corpus(train.corpus)
    target, target_params = load_target(config)
    trainer = plan_trainer(config, target, corpus)
    identity = identify_target(config.target)
    if any(answerer != identity for answerer in corpus.targets):
      logging.warning(
        "the corpus was answered by %s, not by %s: expect a lower tau",
        corpus.targets,
        identity,
      )
    head_ids = None
    if config.drafter.draft_vocabulary:
      head_ids = corpus.frequent_tokens(
        config.drafter.draft_vocabulary, target.config.vocab_size
      )
    compute = jax.tree.map(
      lambda x: x.astype(train.compute_dtype) if x.ndim > 1 else x,
      target_params,
    )

    def read_cache() -> FeatureCache:
      cache = open_cache(config, corpus, target, compute, trainer.layers_read)
      if not train.hybrid_features:
        cache.build(target, compute)
      return cache

    is_cached = train.feature_cache and trainer.layers_read
    cache = take_turns(read_cache) if is_cached else None
    target_params, borrowed = mesh_lib.replicate(
      trainer.mesh, (compute, borrow(compute, head_ids))
    )
    return cls(
      trainer=trainer,
      target_params=target_params,
      borrowed=borrowed,
      corpus=corpus,
      cache=cache,
      head_ids=head_ids,
    )

  def batch(self, indices: Sequence[int] | np.ndarray, rows: int = 0) -> Batch:
    """A row for each of these examples.

    Args:
      indices: of examples.
      rows: at least that many, and as many on each device; those past the
        examples are empty, with nothing supervised.
    """
    lone = [(int(index),) for index in indices]
    rows = mesh_lib.round_up(self.trainer.mesh, max(rows, len(lone)))
    return self._batch(lone + [()] * (rows - len(lone)), 1)

  def train_batch(self, step: int) -> Batch:
    """The batch of one step, a pure function of seed and step."""
    config = self.trainer.config
    batch_size, seed = config.batch_size, config.seed
    if not config.packing:
      return self.batch(self.corpus.train_indices(step, batch_size, seed))
    places = batch_order(step, batch_size, seed, len(self.packed))
    return self._batch([self.packed[place] for place in places], config.packing)

  @functools.cached_property
  def packed(self) -> list[tuple[int, ...]]:
    """The training examples of each packed row."""
    config, examples = self.trainer.config, self.corpus.train
    lengths = self.corpus.lengths[examples]
    rows = pack(lengths, config.sequence_length, config.packing)
    logging.info(
      "packed %d sequences into %d rows; %.1f%% of their tokens are padding",
      len(examples),
      len(rows),
      100
      - 100
      * np.minimum(lengths, config.sequence_length).sum()
      / (len(rows) * config.sequence_length),
    )
    return [tuple(int(examples[place]) for place in row) for row in rows]

  def _batch(self, rows: Sequence[tuple[int, ...]], most: int) -> Batch:
    """Rows of examples, placed on the devices that will work on them."""
    mesh, count = self.trainer.mesh, len(rows)
    mine = [rows[row] for row in mesh_lib.local_rows(mesh, count)]
    return mesh_lib.place_rows(mesh, self._read(mine, most), count)

  def _read(self, rows: Sequence[tuple[int, ...]], most: int) -> Batch:
    """Rows of examples, side by side, with cached features if there are any."""
    B, S = len(rows), self.trainer.config.sequence_length
    cache = self.cache
    tokens: Any = np.zeros((B, S), np.int32)
    mask: Any = np.zeros((B, S), bool)
    documents: Any = np.full((B, S), most, np.int32)  # of padding
    taps: Any = None
    if cache:
      width = len(self.trainer.layers_read) * self.trainer.target.config.width
      taps = np.zeros((B, S, width), np.float16)
      if self.trainer.config.hybrid_features:
        params = mesh_lib.here(self.trainer.mesh, self.target_params)
        asked = [index for examples in rows for index in examples]
        cache.fill(self.trainer.target, params, asked)
    for row, examples in enumerate(rows):
      start = 0
      for number, index in enumerate(examples):
        length = min(int(self.corpus.lengths[index]), S - start)
        place = (row, slice(start, start + length))
        example = self.corpus.example(index)
        tokens[place], mask[place] = (x[:length] for x in example)
        documents[place] = number
        if cache and taps is not None:
          taps[place] = cache.batch(np.array([index]), length)[0]
        start += length
    return Batch(tokens, mask, documents, taps)

  @functools.cached_property
  def evaluation(self) -> np.ndarray:
    """Indices of the answers that are walked."""
    split = self.corpus.held_out
    if not split.size:
      logging.warning("no held-out sequences: evaluating on training ones")
      split = self.corpus.train
    return spread(split, self.trainer.config.evaluate_sequences)

  def tap_scale(self) -> np.ndarray | None:
    """f32[taps * D], measured on a few training examples; None of no taps."""
    if not self.trainer.drafter.taps:
      return None
    lone = [(int(i),) for i in spread(self.corpus.train, SCALE_EXAMPLES)]
    batch = self._read(lone, 1)
    params = mesh_lib.here(self.trainer.mesh, self.target_params)
    taps = jax.jit(self.trainer.learner.taps)(params, batch)
    taps = np.asarray(taps)[..., : self.trainer.tap_width]
    return tell(measure_tap_scale(taps, np.asarray(batch.documents) == 0))
