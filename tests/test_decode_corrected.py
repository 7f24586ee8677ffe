"""Drafters that correct their drafts, in the loop: still lossless.

Tokens of certain drafts, laws of drawn ones: enumerated through the very
functions that draft, and counted over the whole loop.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import autoregression, proposal
from dflash_jax.config import ConfigError
from dflash_jax.decode import check_pairing
from dflash_jax.drafters import DFlash, NoDrafter
from dflash_jax.drafters.correctors import Correction
from dflash_jax.networks import Selector
from dflash_jax.proposal import Drafting, Moment
from dflash_jax.sampling import GREEDY, Sampling
from dflash_jax.width import Fixed, Goodput, Threshold
from tests import test_rejection as rejection_tests
from tests.test_decode import (
  BUDGETS,
  LAW,
  VOCAB,
  chi_squared,
  count_replies,
  decoder_of,
  joint_law,
  plain_tokens,
  reply,
)
from tests.test_rejection import EXACT, Case, Chains, K, law_error, prefixes
from tests.testing import (
  VARIANTS,
  tiny_drafter_config,
  tiny_model,
  tiny_target_config,
)

DRAWN = Sampling(temperature=1.3)
TINY = 5  # tokens of the counted laws

# --- Tokens -------------------------------------------------------------------

CERTAIN = {
  "greedy chain": (GREEDY, Drafting(4)),
  "greedy tree": (GREEDY, Drafting(11, is_tree=True)),
  "coupled chain": (LAW, Drafting(4, sampling=DRAWN, is_coupled=True)),
  "coupled tree": (LAW, Drafting(11, True, DRAWN, is_coupled=True)),
}


@functools.cache
def expected(sampling: Sampling) -> list[list[int]]:
  """Of plain decoding, which no drafter shapes."""
  return plain_tokens(tiny_model(VOCAB), sampling)


@pytest.mark.parametrize(
  ("variant", "kind"),
  [
    ("dflash2", "greedy chain"),
    ("dflash2", "coupled tree"),
    ("dspark", "greedy tree"),
    ("dspark gated", "coupled chain"),
    ("dspark rnn", "coupled tree"),
    ("domino", "greedy chain"),
    ("domino shifted", "greedy tree"),
  ],
)
def test_certain_drafts_give_the_tokens_of_plain_decoding(variant, kind):
  sampling, drafting = CERTAIN[kind]
  model = tiny_model(VOCAB, parts=VARIANTS[variant])
  decoder = decoder_of(
    model,
    sampling=sampling,
    drafting=drafting,
    policy=Fixed(),
    rule="greedy" if sampling.is_greedy else "coupled",
  )
  replies = reply(model, decoder)
  assert [c.tokens for c in replies] == expected(sampling)
  assert [len(c.tokens) for c in replies] == BUDGETS


def test_an_anchor_that_predicts_makes_a_block_one_draft_longer():
  shifted = tiny_model(VOCAB, parts=VARIANTS["dspark"]).drafter
  plain = tiny_model(VOCAB, parts=VARIANTS["domino"]).drafter
  block = plain.config.block_size
  assert shifted.config.block_size == block
  assert (shifted.max_drafts, plain.max_drafts) == (block, block - 1)


# --- Laws, enumerated ---------------------------------------------------------

WIDTH, V, SEED = 24, 4, 11
IDS = np.array([0, 2, 3])
KINDS = {
  name: parts | ({"selector": Selector(5, 2)} if name == "dflash2" else {})
  for name, parts in VARIANTS.items()
}


def tiny_correction(kind: str, ids, batch: int):
  """A random drafter's step and memory before a block of tokens 0..V - 1."""
  target = tiny_target_config(V)
  drafter = DFlash(tiny_drafter_config(target, block_size=K, **KINDS[kind]))
  columns = V if ids is None else len(ids)
  rng = np.random.default_rng(SEED)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.6, jnp.float32),
    drafter.init(jax.random.key(0), columns=columns),
  )
  network = drafter._network(params)
  keys = jax.random.split(jax.random.key(6), 3)
  slots = jax.random.normal(keys[0], (1, K, WIDTH))
  logits = jax.random.normal(keys[1], (1, K, columns))

  def repeat(rows):
    return jnp.repeat(rows, batch, axis=0)

  step = Correction(
    network.corrector,
    jax.random.normal(keys[2], (V, WIDTH)),
    1.0,
    repeat(logits),
    repeat(slots),
  )
  return step, network.corrector.start((batch, 1))


def drafted_chains(monkeypatch, kind: str, ids) -> Chains:
  """Every chain `draft_chain` can draw, and the chance of its draws.

  The draws are scripted; their chances are of the laws that they were drawn
  from, whatever the proposal then states.
  """
  columns = V if ids is None else len(ids)
  script = np.array(list(itertools.product(range(columns), repeat=K)))
  drawn_from = []

  def draw(probs, moment, depths, count):
    drawn_from.append(np.asarray(probs[:, 0], np.float64))
    return jnp.asarray(script[:, [len(drawn_from) - 1]], jnp.int32)[..., None]

  monkeypatch.setattr(proposal, "_draw", draw)
  N = len(script)
  step, memory = tiny_correction(kind, ids, N)
  drafted = autoregression.draft_chain(
    step,
    memory,
    jnp.full((N,), 1, jnp.int32),
    None if ids is None else jnp.asarray(ids, jnp.int32),
    Drafting(K, sampling=DRAWN),
    Moment(jnp.zeros(N, jnp.uint32), jnp.zeros(N, jnp.int32)),
    V,
  )
  case = Case(target_law(), {}, ids)
  probs = [
    [case.target[tuple(path[:depth])] for depth in range(K + 1)]
    for path in np.asarray(drafted.tokens).tolist()
  ]
  chances = [
    law[np.arange(N), script[:, i]] for i, law in enumerate(drawn_from)
  ]
  chances = np.prod(chances, axis=0)
  kept = chances > 0
  return Chains(
    case,
    dataclasses.replace(
      drafted,
      tokens=drafted.tokens[kept],
      law=dataclasses.replace(
        drafted.law,
        probs=drafted.law.probs[kept],
        ranked=drafted.law.ranked[kept],
      ),
    ),
    jnp.asarray(np.array(probs)[kept], jnp.float32),
    chances[kept],
  )


def target_law():
  rng = np.random.default_rng(2)
  return {path: rng.dirichlet(np.full(V, 0.7)) for path in prefixes(V, K)}


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "trimmed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_law_of_corrected_chains_is_the_targets(kind, ids, monkeypatch):
  chains = drafted_chains(monkeypatch, kind, ids)
  assert chains.chances.sum() == pytest.approx(1, abs=EXACT)
  laws = np.asarray(chains.proposal.law.probs[:, -1])
  assert np.ptp(laws, axis=0).max() > 0.05  # it does depend on the path
  for rule in ("token", "block"):
    for way in rejection_tests.ways(chains.case):
      assert law_error(rule, chains, way) < EXACT


@pytest.mark.parametrize("kind", ["dflash2", "dspark rnn", "domino"])
def test_a_law_stated_before_the_correction_is_caught(kind, monkeypatch):
  """Drafts of the corrected logits that claim to be of the slots' own."""
  real = autoregression.from_marginals
  base = tiny_correction(kind, None, V**K)[0].logits

  def stated(logits, *rest, above):
    draft = real(logits, *rest, above=above)
    probs = jax.nn.softmax(base[:, above, None] / DRAWN.temperature)
    law = dataclasses.replace(draft.law, probs=probs)
    return dataclasses.replace(draft, law=law)

  monkeypatch.setattr(autoregression, "from_marginals", stated)
  chains = drafted_chains(monkeypatch, kind, None)
  assert law_error("token", chains, "columns") > 100 * EXACT


# --- Laws, counted over the whole loop ----------------------------------------

RULES = {
  "block": ("block", Fixed()),
  "threshold": ("token", Threshold(0.3)),
}


@pytest.mark.parametrize(
  ("kind", "name"),
  [("dspark rnn", "block"), ("dflash2", "threshold")],
)
def test_replies_of_the_loop_follow_the_targets_law(kind, name):
  rule, policy = RULES[name]
  model = tiny_model(target=tiny_target_config(TINY), parts=KINDS[kind])
  decoder = decoder_of(
    model,
    sampling=LAW,
    rule=rule,
    drafting=Drafting(2, sampling=DRAWN),
    policy=policy,
  )
  counts = count_replies(model, decoder, [2, 0, 3], passes=4)
  assert chi_squared(counts, joint_law(model, [2, 0, 3], LAW)) < 5


# --- Pairings -----------------------------------------------------------------


def corrected() -> DFlash:
  return tiny_model(VOCAB, parts=VARIANTS["dspark"]).drafter


@pytest.mark.parametrize(
  ("drafting", "policy", "message"),
  [
    (Drafting(6, True, DRAWN), Fixed(), "draft_temperature=0 or tree_nodes=0"),
    (Drafting(4, sampling=DRAWN), Goodput(), "width='goodput' weighs all"),
  ],
)
def test_pairings_that_would_bias_the_output_are_refused(
  drafting, policy, message
):
  with pytest.raises(ConfigError, match=message):
    check_pairing(corrected(), drafting, policy)
  check_pairing(tiny_model(VOCAB).drafter, drafting, policy)
  with pytest.raises(ConfigError, match=message):
    decoder_of(
      tiny_model(VOCAB, parts=VARIANTS["dspark"]),
      sampling=LAW,
      rule="token",
      drafting=drafting,
      policy=policy,
    )


@pytest.mark.parametrize(
  ("drafting", "policy"),
  [
    (Drafting(4, sampling=DRAWN), Fixed()),
    (Drafting(4, sampling=DRAWN), Threshold(0.3)),
    (Drafting(4), Goodput()),
    (Drafting(6, True), Goodput()),
    (Drafting(6, True, DRAWN, is_coupled=True), Goodput()),
  ],
)
def test_every_other_pairing_is_taken(drafting, policy):
  check_pairing(corrected(), drafting, policy)


def test_only_correctors_read_their_drafts():
  assert corrected().reads_drafts
  assert not tiny_model(VOCAB).drafter.reads_drafts
  assert not NoDrafter().reads_drafts
  anchored = tiny_model(VOCAB, parts={"anchor_predicts": True}).drafter
  assert not anchored.reads_drafts and anchored.max_drafts == 5
