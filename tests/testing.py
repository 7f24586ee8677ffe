"""Tiny random models for tests, and drafters whose mistakes are planned."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from dflash_jax.config import (
  Config,
  DecodeConfig,
  DrafterConfig,
  TargetConfig,
  TargetSource,
)
from dflash_jax.decode_state import ModelParams
from dflash_jax.drafters import Borrowed, DFlash, NoDrafter
from dflash_jax.model import Model, borrow
from dflash_jax.networks import (
  Confidence,
  Convolution,
  Gru,
  Markov,
  Selector,
)
from dflash_jax.proposal import Drafting, Moment, Proposal, chain
from dflash_jax.target import Params, Target

SCALE = 14.0  # of matrices: wide argmax margins, replies that are not constant
BLOCK_SIZE = 5
# Parts of drafters besides DFlash's layers, by a name for each kind.
VARIANTS: dict[str, dict[str, Any]] = {
  "dflash2": {"convolution": Convolution(3, 2), "selector": Selector(5, 7)},
  "dspark": {
    "anchor_predicts": True,
    "markov": Markov(6),
    "confidence": Confidence(),
  },
  "dspark gated": {
    "anchor_predicts": True,
    "markov": Markov(3, "gated"),
    "confidence": Confidence(sees_token=False),
  },
  "dspark rnn": {"anchor_predicts": True, "markov": Markov(5, "rnn")},
  "domino": {"gru": Gru(7, 5, plain_slots=1)},
  "domino shifted": {"gru": Gru(9, 4, plain_slots=2), "anchor_predicts": True},
}
PRINTABLE = 94  # the byte tokenizer's first ids are "!" to "~"


def tiny_target_config(vocab: int = 263, **overrides) -> TargetConfig:
  """A target with unequal sizes, so that a swapped axis fails."""
  sizes = TargetConfig(
    family="llama",
    num_layers=3,
    width=24,
    mlp_width=38,
    num_heads=6,
    num_kv_heads=3,
    head_width=10,
    vocab_size=vocab,
    rotary_base=1000.0,
  )
  return dataclasses.replace(sizes, **overrides)


def tiny_drafter_config(target: TargetConfig, **overrides) -> DrafterConfig:
  """A drafter that fits `target`, with sizes unlike the target's."""
  sizes = DrafterConfig(
    num_layers=2,
    width=target.width,
    mlp_width=34,
    num_heads=4,
    num_kv_heads=2,
    head_width=6,
    vocab_size=target.vocab_size,
    block_size=BLOCK_SIZE,
    mask_token_id=target.vocab_size - 1,
    target_layer_ids=(0, min(2, target.num_layers - 1)),
    num_target_layers=target.num_layers,
    target_width=target.width,
    rotary_base=target.rotary_base,
  )
  return dataclasses.replace(sizes, **overrides)


def random_params(formulas: Target | DFlash, seed: int) -> Params:
  """Random parameters whose matrices are large enough to matter.

  Those that a new drafter has at zero are drawn too.
  """
  params = formulas.init(jax.random.key(seed))

  def enlarge(x: jax.Array) -> jax.Array:
    if x.ndim < 2:
      return x
    drawn = 0.02 * jax.random.normal(jax.random.key(seed), x.shape)
    return SCALE * jnp.where(x.any(), x, drawn)

  return jax.tree.map(enlarge, params)


@functools.cache
def _tiny_target(config: TargetConfig, seed: int) -> Params:
  params = random_params(Target(config), seed)
  if config.vocab_size >= VOCAB_SIZE:
    head = params["head"]["kernel"]
    params["head"]["kernel"] = head.at[:, PRINTABLE:].set(0.0)
  return params


def tiny_model(
  vocab: int = 263,
  drafter: bool = True,
  *,
  seed: int = 0,
  eos_ids: tuple[int, ...] = (),
  target: TargetConfig | None = None,
  parts: dict[str, Any] | None = None,
  **decode,
) -> Model:
  """A random target, with a random drafter or none.

  Args:
    vocab: V; with at least 259 the model has a byte tokenizer and answers in
      printable characters that never end a turn; else it has none.
    drafter: whether it has one; untrained, so it is almost always wrong.
    seed: of the random weights.
    eos_ids: stop tokens, besides the byte tokenizer's.
    target: instead of tiny_target_config.
    parts: of the drafter, as in VARIANTS.
    **decode: further fields of DecodeConfig.
  """
  network = target or tiny_target_config(vocab, eos_ids=eos_ids)
  formulas = Target(network)
  params = _tiny_target(network, seed)
  draft = NoDrafter()
  if drafter:
    draft = DFlash(tiny_drafter_config(network, **(parts or {})))
  has_text = network.vocab_size >= VOCAB_SIZE
  return Model(
    config=Config(
      name="tiny",
      target=TargetSource(random=network),
      decode=DecodeConfig(
        **{"width": f"fixed:{BLOCK_SIZE - 1}", "max_length": 509} | decode
      ),
    ),
    target=formulas,
    drafter=draft,
    params=ModelParams(
      target=params,
      drafter=random_params(draft, seed + 1) if drafter else {},
      borrowed=borrow(params, None),
    ),
    tokenizer=byte_tokenizer(network.vocab_size) if has_text else None,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OracleState:
  """How far each row has come: i32[B], tokens read."""

  length: jax.Array


@dataclasses.dataclass(frozen=True)
class Oracle:
  """A drafter that knows the true text, and errs where it was told to.

  Its parameters are {"text": i32[B, M]}, prompt and reply of every row; an
  error is planted by changing a token of it (see `oracle_model`).
  """

  max_drafts: int = BLOCK_SIZE - 1
  taps: tuple[int, ...] = ()
  reads_drafts: bool = False

  def init_state(self, batch: int, capacity: int, dtype: str) -> OracleState:
    """Nothing read yet."""
    del capacity, dtype
    return OracleState(jnp.zeros((batch,), jnp.int32))

  def absorb(
    self,
    params: Params,
    state: OracleState,
    taps: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
  ) -> OracleState:
    """Counts tokens."""
    del params, taps, tokens
    return OracleState(state.length + count)

  def propose(
    self,
    params: Params,
    state: OracleState,
    anchor: jax.Array,
    borrowed: Borrowed,
    drafting: Drafting,
    moment: Moment,
    remaining: jax.Array,
  ) -> Proposal:
    """What follows the anchor, which stands at state.length."""
    del anchor, borrowed, moment
    ahead = state.length[:, None] + 1 + jnp.arange(drafting.num_nodes)
    return chain(jnp.take_along_axis(params["text"], ahead, axis=1))


def oracle_model(
  model: Model,
  prompts: list[list[int]],
  replies: list[list[int]],
  errors: list[list[int]],
) -> Model:
  """`model` with a drafter that proposes its own replies, but for errors.

  Args:
    model: whose replies these are.
    prompts: token ids of each row.
    replies: what plain decoding makes of them.
    errors: per row, indices into the reply where the draft is wrong.
  """
  vocab = model.target.config.vocab_size
  texts = [[*p, *r] for p, r in zip(prompts, replies, strict=True)]
  width = max(map(len, texts)) + BLOCK_SIZE
  known = np.zeros((len(texts), width), np.int32)
  for row, (text, wrong) in enumerate(zip(texts, errors, strict=True)):
    known[row, : len(text)] = text
    at = np.array(wrong, np.int64) + len(prompts[row])
    known[row, at] = (known[row, at] + 1) % vocab
  params = dataclasses.replace(
    model.params, drafter={"text": jnp.asarray(known)}
  )
  return dataclasses.replace(model, drafter=Oracle(), params=params)
