"""What a run trains on and with: target, new drafter, corpus, features."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dflash_jax.config import Config, ConfigError, DrafterConfig, TargetConfig
from dflash_jax.drafters import Borrowed, DFlash
from dflash_jax.features import choose_taps
from dflash_jax.model import borrow, load_target
from dflash_jax.target import Params
from train.corpus import Corpus, identify_target, spread
from train.feature_cache import FeatureCache, measure_tap_scale
from train.settings import check_settings
from train.step import Batch, Trainer

SCALE_EXAMPLES = 32  # sequences that tell the usual size of each channel


def design_drafter(config: Config, target: TargetConfig) -> DrafterConfig:
  """The architecture config.drafter asks for, on this target.

  Raises:
    ConfigError: for a tap out of range or a mask token outside the vocabulary.
  """
  draft = config.drafter
  if draft.name != "dflash":
    raise ConfigError(
      f"drafter.name={draft.name!r} cannot be trained; choose 'dflash'"
    )
  try:
    taps = draft.taps or choose_taps(target.num_layers, draft.num_taps)
  except ValueError as error:
    raise ConfigError(f"drafter: {error}") from error
  return DrafterConfig(
    num_layers=draft.num_layers,
    width=target.width,
    mlp_width=draft.mlp_width or target.mlp_width,
    num_heads=draft.num_heads or target.num_heads,
    num_kv_heads=draft.num_kv_heads or target.num_kv_heads,
    head_width=draft.head_width or target.head_width,
    vocab_size=target.vocab_size,
    block_size=draft.block_size,
    mask_token_id=draft.mask_token_id,
    target_layer_ids=tuple(taps),
    num_target_layers=target.num_layers,
    target_width=target.width,
    norm_epsilon=target.norm_epsilon,
    rotary_base=target.rotary_base,
    layer_windows=tuple(draft.layer_windows),
    layer_causal=tuple(draft.layer_causal),
    max_length=target.max_length,
  )


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
    corpus = Corpus(train.corpus)
    target, target_params = load_target(config)
    drafter = DFlash(design_drafter(config, target.config))
    corpus.check_vocabulary(target.config.vocab_size)
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
    trainer = Trainer.create(target, drafter, train)
    cache = None
    if train.feature_cache:
      cache = FeatureCache(
        train.feature_cache,
        corpus,
        trainer.layers_read,
        len(trainer.layers_read) * target.config.width,
        {"target": identity, "dtype": train.compute_dtype},
      )
      if not cache.is_complete:
        cache.build(target, compute)
    return cls(
      trainer=trainer,
      target_params=compute,
      borrowed=borrow(compute, head_ids),
      corpus=corpus,
      cache=cache,
      head_ids=head_ids,
    )

  def batch(self, indices: np.ndarray, rows: int = 0) -> Batch:
    """The examples of these indices, with cached features if there are any.

    Args:
      indices: i64[B].
      rows: at least that many; those past B are empty, with nothing supervised.
    """
    length = self.trainer.config.sequence_length
    arrays = list(self.corpus.batch(indices, length))
    if self.cache:
      arrays.append(self.cache.batch(indices, length))
    empty = max(0, rows - len(indices))
    tokens, mask, *taps = [
      jnp.asarray(np.pad(x, [(0, empty)] + [(0, 0)] * (x.ndim - 1)))
      for x in arrays
    ]
    return Batch(tokens=tokens, loss_mask=mask, taps=taps[0] if taps else None)

  def train_batch(self, step: int) -> Batch:
    """The batch of one step, a pure function of seed and step."""
    config = self.trainer.config
    return self.batch(
      self.corpus.train_indices(step, config.batch_size, config.seed)
    )

  @functools.cached_property
  def evaluation(self) -> np.ndarray:
    """Indices of the answers that are walked."""
    split = self.corpus.held_out
    if not split.size:
      logging.warning("no held-out sequences: evaluating on training ones")
      split = self.corpus.train
    return spread(split, self.trainer.config.evaluate_sequences)

  def tap_scale(self) -> jax.Array:
    """f32[taps * D], measured on a few training examples."""
    indices = spread(self.corpus.train, SCALE_EXAMPLES)
    batch = self.batch(indices)
    taps = jax.jit(Trainer.taps, static_argnums=0)(
      self.trainer, self.target_params, batch
    )[..., : self.trainer.tap_width]
    lengths = np.minimum(self.corpus.lengths[indices], batch.tokens.shape[1])
    valid = np.arange(batch.tokens.shape[1]) < lengths[:, None]
    return jnp.asarray(measure_tap_scale(np.asarray(taps), valid))
