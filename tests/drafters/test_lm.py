"""A small language model as the drafter: what it knows, states and costs."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import model as model_lib
from dflash_jax import weights
from dflash_jax.config import (
  Config,
  ConfigError,
  DecodeConfig,
  DraftConfig,
  TargetSource,
)
from dflash_jax.drafters import LanguageModel
from dflash_jax.proposal import Drafting, Moment
from dflash_jax.sampling import GREEDY, Sampling, weigh
from dflash_jax.session import Session
from dflash_jax.target import Target
from dflash_jax.width import Goodput, Threshold
from tests.drafters.baselines import (
  CHAIN,
  DRAFTS,
  DRAWN,
  LAW,
  NOTHING,
  TREE,
  VOCAB,
  Script,
  check_rows_alone,
  decoder_of,
  model_with,
  plain_talk,
  questions,
  rehearse,
  sharpen,
  talk,
  worst_confidence,
  worst_law,
)
from tests.test_decode import TINY, chi_squared, count_replies, joint_law
from tests.test_rejection import (
  EXACT,
  Case,
  Chains,
  K,
  chain_emissions,
  output_law,
  target_law,
)
from tests.testing import random_params, tiny_model, tiny_target_config

SMALL = tiny_target_config(
  VOCAB, num_layers=2, width=14, mlp_width=22, num_heads=4, num_kv_heads=2
)
DRAWN_CHAIN = dataclasses.replace(CHAIN, sampling=DRAWN)


@functools.cache
def small(kind: type[LanguageModel] = LanguageModel):
  """A random drafter and its parameters."""
  drafter = kind(SMALL, DRAFTS)
  return drafter, sharpen(random_params(drafter, 5))


@functools.partial(jax.jit, static_argnums=0)
def read_all(network, params, texts):
  """f32[N, L, V], the logits of whole texts, from one pass with no past."""
  cache = network.init_cache(*texts.shape)
  hidden, _, _ = network.forward(params, texts, cache)
  return network.logits(params, hidden)


def true_laws(script, offers, sampling):
  """f64[N, V] of each drafted node, read from scratch."""
  _, params = small()
  _, texts, _, lengths, depths = questions(script, offers)
  logits = read_all(Target(SMALL), params, texts)
  last = logits[np.arange(len(texts)), lengths + depths - 1]
  laws = np.asarray(weigh(last, sampling), np.float64)
  return laws / laws.sum(-1, keepdims=True)


def error(kind, drafting) -> float:
  """Farthest from the truth, over nodes, rounds and rows."""
  script = Script.write(1, 0)
  asked, _ = small(kind if "_step" in vars(kind) else LanguageModel)
  keeper, params = small(kind)
  offers = rehearse(asked, params, script, drafting, keeper=keeper)
  if drafting.is_certain:
    laws = true_laws(script, offers, Sampling(temperature=1.0))
    return worst_confidence(script, offers, laws)
  return worst_law(script, offers, true_laws(script, offers, drafting.sampling))


# --- What it knows ------------------------------------------------------------


@pytest.mark.parametrize(
  "drafting",
  [pytest.param(CHAIN, marks=pytest.mark.slow), TREE, DRAWN_CHAIN],
  ids=["chain", "tree", "drawn"],
)
def test_every_node_is_as_likely_as_from_scratch(drafting):
  """After rejections, bonus tokens and rest, with no token left out."""
  assert error(LanguageModel, drafting) < 1e-5


@dataclasses.dataclass(frozen=True)
class Stale(LanguageModel):
  """Keeps the rows of rejected drafts."""

  def absorb(self, params, state, taps, tokens, count):
    count = jnp.where(count > 0, tokens.shape[1], 0)
    return super().absorb(params, state, taps, tokens, count)


@dataclasses.dataclass(frozen=True)
class Gap(LanguageModel):
  """Never reads the last accepted draft, as one that keeps draft rows may."""

  def absorb(self, params, state, taps, tokens, count):
    after = super().absorb(params, state, taps, tokens, count)
    unread = jnp.maximum(count - (count == DRAFTS + 1), 0)
    return dataclasses.replace(after, length=state.length + unread)


@dataclasses.dataclass(frozen=True)
class Orphans(LanguageModel):
  """Nodes take the first node above for their parent."""

  def _step(self, params, cache, nodes, tokens, parents, depth):
    parents = jnp.zeros_like(parents)
    return super()._step(params, cache, nodes, tokens, parents, depth)


@dataclasses.dataclass(frozen=True)
class Standing(LanguageModel):
  """All nodes stand at the anchor's position."""

  def _step(self, params, cache, nodes, tokens, parents, depth):
    return super()._step(params, cache, nodes, tokens, parents, 0)


@pytest.mark.parametrize(
  ("planted", "drafting"),
  [(Stale, CHAIN), (Gap, CHAIN), (Orphans, TREE), (Standing, TREE)],
  ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_error_is_caught(planted, drafting):
  assert error(planted, drafting) > 1e-2


# --- In the decode loop -------------------------------------------------------


@pytest.mark.parametrize(
  ("drafting", "sampling"),
  [
    (dataclasses.replace(TREE, sampling=DRAWN, is_coupled=True), LAW),
    pytest.param(CHAIN, GREEDY, marks=pytest.mark.slow),
    pytest.param(TREE, GREEDY, marks=pytest.mark.slow),
    pytest.param(
      dataclasses.replace(DRAWN_CHAIN, is_coupled=True),
      LAW,
      marks=pytest.mark.slow,
    ),
  ],
  ids=["coupled tree", "greedy chain", "greedy tree", "coupled chain"],
)
def test_replies_are_those_of_plain_decoding(drafting, sampling):
  """Over two turns."""
  model = model_with(*small())
  decoder = decoder_of(model, drafting, sampling)
  assert talk(model, decoder) == plain_talk(sampling)


def test_where_nothing_is_asked_nothing_is_drafted():
  drafter, params = small()
  script = Script.write(1, 0)
  for offer in rehearse(drafter, params, script, Drafting(0)):
    assert offer.proposal.tokens.shape == (3, 0)
    assert offer.proposal.law is None


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Threshold(0.3), Goodput()])
def test_widths_that_rest_keep_the_tokens(policy):
  """What a burst read is absorbed at once."""
  model = model_with(*small())
  decoder = decoder_of(model, TREE, policy=policy)
  assert talk(model, decoder) == plain_talk(GREEDY)


def test_rows_alone_reply_as_in_company_and_compile_once():
  check_rows_alone(*small())


def test_the_target_as_its_own_drafter_is_always_right():
  """So every round emits all drafts and the bonus token."""
  config = dataclasses.replace(SMALL, num_layers=1)
  model = tiny_model(drafter=False, target=config)
  drafter = LanguageModel(config, DRAFTS)
  params = dataclasses.replace(model.params, drafter=model.params.target)
  model = dataclasses.replace(model, drafter=drafter, params=params)
  budget = 1 + 4 * (DRAFTS + 1)
  session = Session(model, decoder_of(model, CHAIN), 1, 40, budget)
  reply = session.reply([[5, 1, 8]], [budget])[0]
  assert reply.tau == DRAFTS + 1


# --- Laws ---------------------------------------------------------------------


def every_law(seeds: int = 600):
  """Chains of three tokens drawn from a vocabulary of three, and a Case.

  Returns:
    Chains i64[N, K], drawn with as many seeds, and the Case whose draft laws
    are the stated ones.
  """
  config = dataclasses.replace(SMALL, vocab_size=3)
  drafter = LanguageModel(config, K)
  params = random_params(drafter, 8)
  drafting = Drafting(K, sampling=DRAWN)
  text = np.tile(np.array([[2, 0, 1, 1]], np.int32), (seeds, 1))

  @jax.jit
  def propose(params):
    state = drafter.init_state(seeds, 8, "float32")
    everything = jnp.full((seeds,), text.shape[1] - 1)
    state = drafter.absorb(params, state, NOTHING, text, everything)
    moment = Moment(jnp.arange(seeds, dtype=jnp.uint32), everything)
    anchor = text[:, -1]
    return drafter.propose(
      params, state, anchor, NOTHING, drafting, moment, everything
    )

  proposal = jax.device_get(propose(params))
  stated: dict[tuple[int, ...], list[np.ndarray]] = {}
  for chain, laws in zip(proposal.tokens, proposal.law.probs, strict=True):
    for depth, law in enumerate(laws):
      stated.setdefault(tuple(chain[:depth].tolist()), []).append(law)
  draft = {}
  for prefix, laws in stated.items():
    assert np.ptp(laws, axis=0).max() < 1e-5, "a law that leaks later draws"
    draft[prefix] = laws[0].astype(np.float64) / laws[0].sum(dtype=np.float64)
  rng = np.random.default_rng(0)
  target = {
    prefix: rng.dirichlet(np.full(3, 0.7))
    for size in range(K + 1)
    for prefix in itertools.product(range(3), repeat=size)
  }
  return proposal.tokens, Case(target, draft, None)


@pytest.fixture(scope="module")
def drawn():
  return every_law()


def test_chains_are_drawn_from_the_laws_they_state(drawn):
  tokens, case = drawn
  assert len(case.draft) == 1 + 3 + 9
  law = np.zeros((3,) * K)
  for chain in itertools.product(range(3), repeat=K):
    law[chain] = np.prod([case.draft[chain[:i]][chain[i]] for i in range(K)])
  counts = np.zeros((3,) * K, np.int64)
  np.add.at(counts, tuple(tokens.T), 1)
  assert chi_squared(counts, law) < 5
  swapped = chi_squared(counts, np.roll(law, 1, axis=-1))
  assert swapped > 8  # a law of other tokens is told apart


@pytest.mark.parametrize("rule", ["token", "block"])
def test_rules_keep_the_targets_law_with_the_stated_ones(drawn, rule):
  """Every draft, decision and replacement, weighed by its probability."""
  chains = Chains.create(drawn[1])
  for way in ("columns", "probabilities"):
    law = output_law(drawn[1], chain_emissions(rule, chains, way))
    np.testing.assert_allclose(law, target_law(drawn[1]), atol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["token", "block"])
def test_replies_follow_the_targets_law(rule):
  """3e4 replies of the whole loop against the joint law of three tokens."""
  config = tiny_target_config(TINY, num_layers=2)
  model = tiny_model(drafter=False, target=config)
  drafter = LanguageModel(dataclasses.replace(SMALL, vocab_size=TINY), 2)
  params = random_params(drafter, 3)
  model = dataclasses.replace(
    model,
    drafter=drafter,
    params=dataclasses.replace(model.params, drafter=params),
  )
  decoder = decoder_of(model, Drafting(2, sampling=DRAWN), LAW, rule)
  counts = count_replies(model, decoder, [2, 0, 3], passes=8)
  assert chi_squared(counts, joint_law(model, [2, 0, 3], LAW)) < 5


# --- Files --------------------------------------------------------------------


@pytest.mark.parametrize("borrows", [False, True], ids=["own", "borrowed"])
def test_a_saved_model_drafts_as_before(tmp_path, borrows):
  """Whole, in its family's layout, with the target's tables if borrowed."""
  model = model_with(*small())
  config = dataclasses.replace(SMALL, width=24) if borrows else SMALL
  drafter = LanguageModel(config, DRAFTS, borrows)
  own = random_params(drafter, 4)
  assert ("embedding" in own) != borrows
  params = drafter.bind(own, model.params.borrowed)
  weights.save_target(tmp_path / "lm", config, params, dtype="float32")
  assert weights.drafter_kind(str(tmp_path / "lm")) == "lm"
  found, loaded = weights.load_target(str(tmp_path / "lm"))
  assert found == config
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_config_names_it_by_its_directory(tmp_path):
  small_config = dataclasses.replace(SMALL, vocab_size=263)
  params = random_params(LanguageModel(small_config, 5), 0)
  weights.save_target(tmp_path / "lm", small_config, params, dtype="float32")
  config = Config(
    target=TargetSource(random=tiny_target_config(263)),
    drafter=DraftConfig(path=str(tmp_path / "lm"), block_size=6),
    decode=DecodeConfig(block_size=3),
  )
  model = model_lib.load(config)
  assert model.drafter == LanguageModel(small_config, 5)
  assert model.decoder().drafter.max_drafts == 2
  config.target.random = tiny_target_config(264)
  with pytest.raises(ConfigError, match="vocabulary is 263 .* 264"):
    model_lib.load(config)
