"""A target, its drafter and its tokenizer, loaded and ready to decode."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax import fp8, weights
from dflash_jax.byte_tokenizer import byte_tokenizer
from dflash_jax.config import (
  Config,
  ConfigError,
  DecodeConfig,
  DraftConfig,
  TargetConfig,
  TargetSource,
)
from dflash_jax.decode import Decoder
from dflash_jax.decode_state import ModelParams
from dflash_jax.drafters import (
  Borrowed,
  DFlash,
  Drafter,
  Eagle3,
  LanguageModel,
  NGram,
  NoDrafter,
)
from dflash_jax.proposal import Drafting
from dflash_jax.sampling import GREEDY, Sampling
from dflash_jax.target import Params, Target
from dflash_jax.tokenizer import Tokenizer, load_tokenizer
from dflash_jax.width import Costs, Fixed, parse_width

# Drafts of a chain worth verifying per round, by device;
# docs/default_drafter.md has the measurement. Devices not named verify all.
CHAIN_WIDTHS = {"cpu": "fixed:3"}
# Drafts that an adaptive width chooses among, at most, by device. Each costs a
# CPU 0.6% of a round even if it is never verified, and later ones rarely are.
ADAPTIVE_NODES = {"cpu": 5}


@dataclasses.dataclass(frozen=True)
class Model:
  """Everything that turns a prompt into text.

  Attributes:
    config: of the run.
    target, drafter: the formulas.
    params: of both.
    tokenizer: None for a model of bare token ids.
    cost_tables: what rounds cost on this device, by decoder and batch; a
      Session measures what its width policy asks for.
    beliefs: what each decoder's width policy made of the replies so far; the
      next Session begins with it.
  """

  config: Config
  target: Target
  drafter: Drafter
  params: ModelParams
  tokenizer: Tokenizer | None
  cost_tables: dict[tuple[Decoder, int], Costs] = dataclasses.field(
    default_factory=dict
  )
  beliefs: dict[Decoder, Any] = dataclasses.field(default_factory=dict)

  @property
  def stop_ids(self) -> tuple[int, ...]:
    """Tokens that end a reply."""
    own = self.tokenizer.eos_ids if self.tokenizer else ()
    return tuple(sorted({*self.target.config.eos_ids, *own}))

  @property
  def drafter_bytes(self) -> int:
    """Of the drafter's own weights, without tables that it borrows."""
    tables = {id(self.params.borrowed.embedding), id(self.params.borrowed.head)}
    leaves = jax.tree.leaves(self.params.drafter, is_leaf=fp8.is_kernel)
    own = [leaf for leaf in leaves if id(leaf) not in tables]
    return fp8.stored_bytes(own, self.config.target.dtype)

  def decoder(self, sampling: Sampling | None = None) -> Decoder:
    """The decode loop for this model, as the config's decode section asks.

    Args:
      sampling: the target's law, instead of the config's.
    """
    decode = self.config.decode
    given = decode.rule if sampling is None else ""
    sampling = sampling or Sampling(
      decode.temperature, decode.top_k, decode.top_p, decode.min_p
    )
    rule = given or ("greedy" if sampling.is_greedy else "coupled")
    if decode.tree_nodes < 0:
      raise ConfigError(
        f"tree_nodes={decode.tree_nodes} is impossible; use 0 for chains, or "
        "at least 1"
      )
    device = jax.default_backend()
    drafter = _shorten(self.drafter, decode.block_size)
    nodes = decode.tree_nodes or drafter.max_drafts
    text = decode.width or (
      "" if decode.tree_nodes else CHAIN_WIDTHS.get(device)
    )
    policy = parse_width(text) if text else Fixed()
    if isinstance(policy, Fixed):
      nodes = policy.widths(nodes)[0]
    elif not decode.tree_nodes:
      nodes = min(nodes, ADAPTIVE_NODES.get(device, nodes))
    drafts = _draft_sampling(decode)
    if not drafter.max_drafts:  # plain decoding
      nodes, policy, drafts = 0, Fixed(), GREEDY
    return Decoder(
      target=self.target,
      drafter=drafter,
      drafting=Drafting(
        num_nodes=nodes,
        is_tree=decode.tree_nodes > 0 and nodes > 0,
        sampling=drafts,
        is_coupled=rule == "coupled",
      ),
      policy=policy,
      rule=rule,
      sampling=sampling,
      stop_ids=self.stop_ids,
      rounds_per_dispatch=decode.rounds_per_dispatch,
      dtype=self.config.target.dtype,
      early_exit=device == "cpu",
    )

  def without_drafter(self) -> "Model":
    """The same target, decoding plainly."""
    params = dataclasses.replace(self.params, drafter={})
    return dataclasses.replace(self, drafter=NoDrafter(), params=params)

  def with_drafter(self, source: DraftConfig) -> "Model":
    """The same target with the drafter of source.path; errors as in `load`."""
    config = dataclasses.replace(self.config, drafter=source)
    target_params = self.params.target
    drafter, own, head_ids = _load_drafter(config, self.target, target_params)
    return dataclasses.replace(
      self,
      config=config,
      drafter=drafter,
      params=ModelParams(
        target=target_params,
        drafter=own,
        borrowed=borrow(target_params, head_ids),
      ),
      beliefs={},
    )


def load(config: Config) -> Model:
  """Loads what the config names.

  Raises:
    ConfigError: if drafter and target do not match, naming both numbers.
    weights.WeightsError: for a missing or damaged file.
  """
  tokenizer = read_tokenizer(config)  # first: it costs little, and may refuse
  target, params = load_target(config)
  model = Model(
    config=config,
    target=target,
    drafter=NoDrafter(),
    params=ModelParams(
      target=params, drafter={}, borrowed=borrow(params, None)
    ),
    tokenizer=tokenizer,
  )
  return model.with_drafter(config.drafter)


def load_target(config: Config) -> tuple[Target, Params]:
  """The target alone: from its files, or drawn at random."""
  source = config.target
  if source.path:
    network, params = weights.load_target(source.path, source.dtype)
    return Target(network), params
  target = Target(_random_network(source))
  return target, target.init(jax.random.key(source.seed), source.dtype)


def _random_network(source: TargetSource) -> TargetConfig:
  if source.random is None:
    raise ConfigError(
      "target.path is empty and target.random is not set; name an HF "
      "directory, a hub id, a .gguf file or package:NAME in target.path"
    )
  return source.random


def read_tokenizer(config: Config) -> Tokenizer:
  """The target's own; of a random target, a token per byte."""
  source = config.target
  if source.thinking not in ("", "on", "off"):
    raise ConfigError(
      f"target.thinking={source.thinking!r} is unknown; use on, off, or '' for "
      "what the chat template does by itself"
    )
  if source.path:
    tokenizer = load_tokenizer(source.path)
  else:
    tokenizer = byte_tokenizer(_random_network(source).vocab_size)
  if source.thinking:
    return tokenizer.with_thinking(source.thinking == "on")
  return tokenizer


def borrow(target_params: Params, head_ids: np.ndarray | None) -> Borrowed:
  """The target's tables, with the head trimmed to head_ids i32[V'] if given."""
  head = target_params["head"]["kernel"]
  ids = None
  if head_ids is not None:
    ids = jnp.asarray(head_ids, jnp.int32)
    head = jnp.take(head, ids, axis=1)
  return Borrowed(embedding=target_params["embedding"], head=head, head_ids=ids)


def _load_drafter(
  config: Config, target: Target, target_params: Params
) -> tuple[Drafter, Params, np.ndarray | None]:
  """The drafter, what it reads, and the ids that its borrowed head keeps."""
  path, dtype = config.drafter.path, config.target.dtype
  num_drafts = config.drafter.block_size - 1
  if path == "none":
    return NoDrafter(), {}, None
  if path == "ngram":
    return NGram(num_drafts), {}, None
  kind = weights.drafter_kind(path)
  if kind == "dflash":
    network, params, head_ids = weights.load_drafter(path, dtype)
    network.check_target(target.config)
    return DFlash(network), fp8.for_device(params), head_ids
  drafter: Eagle3 | LanguageModel
  if kind == "eagle3":
    eagle, params = weights.load_eagle3(path, dtype, target.config.num_layers)
    drafter = Eagle3(eagle, num_drafts)
  else:
    model, params = weights.load_target(path, dtype, drafts=True)
    drafter = LanguageModel(model, num_drafts)
  drafter.check_target(target.config)
  params = drafter.bind(fp8.for_device(params), borrow(target_params, None))
  return drafter, params, None


def _draft_sampling(decode: DecodeConfig) -> Sampling:
  """How drafts are drawn; complaints name the draft's settings."""
  try:
    return Sampling(decode.draft_temperature, decode.draft_top_k)
  except ConfigError as error:
    raise ConfigError(f"draft_{error}") from error


def _shorten(drafter: Drafter, block_size: int) -> Drafter:
  """The same drafter, drafting blocks of block_size slots; 0 keeps its own."""
  if not block_size or not drafter.max_drafts:
    return drafter
  if isinstance(drafter, NGram | LanguageModel | Eagle3) and block_size > 1:
    return dataclasses.replace(drafter, max_drafts=block_size - 1)
  trained = drafter.max_drafts + 1
  if isinstance(drafter, DFlash):
    trained = drafter.config.block_size
    if 2 <= block_size <= trained:
      shorter = dataclasses.replace(drafter.config, block_size=block_size)
      return DFlash(shorter)
  raise ConfigError(
    f"block_size={block_size} is impossible; this drafter was trained for "
    f"{trained}: use 2 to {trained}, or 0"
  )
