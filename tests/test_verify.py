"""Rules on chains and trees: what they accept, emit, and refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import rejection, verify
from dflash_jax.config import ConfigError
from dflash_jax.noise import Stream
from dflash_jax.prediction import Prediction
from dflash_jax.proposal import Drafting, Law, Moment, Proposal, chain
from dflash_jax.sampling import GREEDY, Sampling, choose
from dflash_jax.tree import Tree
from dflash_jax.verify import RULES, Verifier, match_prefix
from pallas_kernels import noise as kernel_noise

P, V = 5, 11
SAMPLED = Sampling(temperature=1.0)
DRAWN = Sampling(temperature=0.7)


def moment(batch: int, seed: int = 0) -> Moment:
  seeds = jnp.arange(batch, dtype=jnp.uint32) + seed
  return Moment(seeds, 3 + jnp.arange(batch, dtype=jnp.int32))


def random_logits(batch: int, rows: int, seed: int = 0) -> jax.Array:
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(batch, rows, V)) * 2, jnp.float32)


def said(logits: jax.Array) -> Prediction:
  """The prediction whose logits f32[B, T, V] are these, to the bit."""
  return Prediction(logits, jnp.eye(V))


# --- Matching -----------------------------------------------------------------


def test_accepts_exactly_the_leading_run_of_equal_tokens():
  rng = np.random.default_rng(0)
  proposal = rng.integers(0, 2, size=(211, 5))
  chosen = rng.integers(0, 2, size=(211, 6))
  verdict = match_prefix(chain(jnp.asarray(proposal)), jnp.asarray(chosen))
  for row in range(211):
    run = 0
    while run < 5 and proposal[row, run] == chosen[row, run]:
      run += 1
    assert int(verdict.accepted[row]) == run
  np.testing.assert_array_equal(verdict.tokens, chosen)
  assert set(np.asarray(verdict.accepted).tolist()) == set(range(6))


def test_an_empty_proposal_yields_the_targets_own_token():
  empty = chain(jnp.zeros((3, 0), jnp.int32))
  logits = random_logits(3, 1)
  for rule in ("greedy", "token", "block"):
    verdict = Verifier(rule, GREEDY, 0).judge(empty, said(logits), moment(3))
    np.testing.assert_array_equal(verdict.tokens, logits.argmax(-1))
    np.testing.assert_array_equal(verdict.accepted, [0, 0, 0])


@pytest.mark.parametrize("rule", ["coupled", "token", "block"])
def test_certain_drafts_get_the_seeded_choice_of_plain_sampling(rule):
  """One noise per position, so all three rules are the coupled one."""
  logits, where = random_logits(7, P + 1), moment(7)
  positions = where.positions[:, None] + 1 + jnp.arange(P + 1)
  chosen = choose(logits, SAMPLED, where.seeds, positions)
  drafts = chosen[:, :-1].at[3:, 2].add(1) % V
  verdict = Verifier(rule, SAMPLED, P).judge(chain(drafts), said(logits), where)
  np.testing.assert_array_equal(verdict.accepted, [P] * 3 + [2] * 4)
  for row, count in enumerate(verdict.accepted):
    emitted = slice(0, int(count) + 1)
    np.testing.assert_array_equal(
      verdict.tokens[row, emitted], chosen[row, emitted]
    )


def two_branches(tokens) -> Proposal:
  """Anchor -> 1 -> 3, anchor -> 2 -> 4 -> 5, as rows."""
  batch = len(tokens)
  shape = Tree(
    parents=jnp.tile(jnp.array([0, 0, 1, 2, 4]), (batch, 1)),
    depths=jnp.tile(jnp.array([1, 1, 2, 2, 3]), (batch, 1)),
    ranks=jnp.tile(jnp.array([0, 1, 0, 0, 0]), (batch, 1)),
  )
  return dataclasses.replace(chain(jnp.asarray(tokens, jnp.int32)), tree=shape)


@pytest.mark.parametrize(
  "sampling", [GREEDY, SAMPLED], ids=["greedy", "seeded"]
)
def test_a_tree_is_walked_along_the_targets_choices(sampling):
  logits, where = random_logits(2, 6, seed=1), moment(2)

  def choice(row, node, depth):
    return int(
      choose(
        logits[row : row + 1, node : node + 1],
        sampling,
        where.seeds[row : row + 1],
        where.positions[row : row + 1, None] + 1 + depth,
      )[0, 0]
    )

  tokens = np.full((2, 5), -1)
  for row in range(2):  # the right path is anchor -> 2 -> 4, and no further
    tokens[row, 1] = choice(row, 0, 0)
    tokens[row, 3] = choice(row, 2, 1)
  rule = "greedy" if sampling is GREEDY else "coupled"
  verdict = Verifier(rule, sampling, 3).judge(
    two_branches(tokens), said(logits), where
  )
  np.testing.assert_array_equal(verdict.accepted, [2, 2])
  np.testing.assert_array_equal(verdict.path, [[0, 2, 4, 4]] * 2)
  for row in range(2):
    assert verdict.tokens[row, :3].tolist() == [
      tokens[row, 1],
      tokens[row, 3],
      choice(row, 4, 2),
    ]


# --- Drawn drafts -------------------------------------------------------------


EVERY = jnp.arange(V, dtype=jnp.int32)  # a trimmed head that drops nothing
each_head = pytest.mark.parametrize(
  "ids", [None, EVERY], ids=["whole", "trimmed"]
)


def drawn_chain(batch: int, ids: jax.Array | None, seed: int = 0) -> Proposal:
  rng = np.random.default_rng(seed)
  law = rng.dirichlet(np.ones(V), (batch, P))
  tokens = np.array([[rng.choice(V, p=q) for q in row] for row in law])
  return dataclasses.replace(
    chain(jnp.asarray(tokens, jnp.int32)),
    law=Law(
      probs=jnp.asarray(law, jnp.float32),
      ids=ids,
      ranked=jnp.asarray(tokens, jnp.int32)[..., None],
    ),
  )


def script(monkeypatch, draws):
  """Makes the accepting draws those of the script f32[B, P]."""
  real = kernel_noise.uniform

  def uniform(stream, seeds, moments, count):
    if stream is Stream.ACCEPT:
      return jnp.asarray(draws, jnp.float32)[:, :count]
    return real(stream, seeds, moments, count)

  monkeypatch.setattr(verify.noise, "uniform", uniform)
  monkeypatch.setattr(kernel_noise, "uniform", uniform)


@each_head
def test_the_token_rule_stops_at_the_first_failure(monkeypatch, ids):
  proposal, logits = drawn_chain(3, ids), random_logits(3, P + 1)
  script(monkeypatch, [[0] * 5, [0, 0, 2, 0, 0], [2, 0, 0, 0, 0]])
  verdict = Verifier("token", SAMPLED, P).judge(
    proposal, said(logits), moment(3)
  )
  np.testing.assert_array_equal(verdict.accepted, [5, 2, 0])
  np.testing.assert_array_equal(verdict.tokens[0, :5], proposal.tokens[0])
  np.testing.assert_array_equal(verdict.tokens[1, :2], proposal.tokens[1, :2])


@each_head
def test_the_block_rule_takes_the_last_success(monkeypatch, ids):
  proposal, logits = drawn_chain(3, ids), random_logits(3, P + 1)
  script(monkeypatch, [[2, 2, 2, 2, 2], [2, 0, 2, 0, 2], [2, 2, 2, 2, 0]])
  verdict = Verifier("block", SAMPLED, P).judge(
    proposal, said(logits), moment(3)
  )
  np.testing.assert_array_equal(verdict.accepted, [0, 4, 5])
  np.testing.assert_array_equal(verdict.tokens[1, :4], proposal.tokens[1, :4])


@each_head
def test_a_rejected_draft_is_drawn_anew_from_the_residual(monkeypatch, ids):
  """Counts over many seeds against the residual law, computed apart."""
  draws = 20_011
  proposal, logits = drawn_chain(1, None), random_logits(1, P + 1)
  repeat = repeater(draws)
  rows = jax.tree.map(repeat, proposal)
  rows = dataclasses.replace(rows, law=dataclasses.replace(rows.law, ids=ids))
  script(monkeypatch, np.tile([[0, 2, 0, 0, 0]], (draws, 1)))
  verdict = Verifier("token", SAMPLED, P).judge(
    rows, said(repeat(logits)), moment(draws)
  )
  assert set(np.asarray(verdict.accepted).tolist()) == {1}
  p = np.asarray(jax.nn.softmax(logits[0, 1]))
  left = np.maximum(p - np.asarray(proposal.law.probs[0, 1]), 0)
  counts = np.bincount(np.asarray(verdict.tokens[:, 1]), minlength=V) / draws
  np.testing.assert_allclose(
    counts, left / left.sum(), atol=5 * 0.5 / np.sqrt(draws)
  )
  assert (counts[left == 0] == 0).all()


def repeater(count):
  return lambda x: jnp.repeat(x, count, axis=0)


@each_head
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_k=1)])
def test_a_certain_target_keeps_only_its_own_token(sampling, ids):
  """Temperature 0 under the token rule: drafts that are its argmax stay."""
  proposal, logits = drawn_chain(5, ids), random_logits(5, P + 1)
  best = logits.argmax(-1)
  proposal = dataclasses.replace(
    proposal,
    tokens=proposal.tokens.at[:, :2].set(best[:, :2]),
    law=dataclasses.replace(
      proposal.law,
      ranked=proposal.law.ranked.at[:, :2, 0].set(best[:, :2]),
    ),
  )
  for rule in ("token", "block"):
    verdict = Verifier(rule, sampling, P).judge(
      proposal, said(logits), moment(5)
    )
    assert (verdict.accepted >= 2).all()
    last = verdict.accepted[:, None]
    np.testing.assert_array_equal(
      jnp.take_along_axis(verdict.tokens, last, 1),
      jnp.take_along_axis(best, last, 1),
    )


def test_typical_acceptance_is_more_lenient_where_the_target_is_unsure():
  flat = jnp.zeros((1, P + 1, V))
  sure = jnp.zeros((1, P + 1, V)).at[..., 3].set(9.0)
  drafts = chain(jnp.full((1, P), 4, jnp.int32))
  lossy = Verifier("typical", SAMPLED, P)
  assert int(lossy.judge(drafts, said(flat), moment(1)).accepted[0]) == P
  assert int(lossy.judge(drafts, said(sure), moment(1)).accepted[0]) == 0


# --- Pairings -----------------------------------------------------------------


@pytest.mark.parametrize(
  ("rule", "sampling", "drafting", "message"),
  [
    ("best", GREEDY, Drafting(P), "rule='best' is unknown; choose one of"),
    ("greedy", SAMPLED, Drafting(P), "would not sample; use rule='coupled'"),
    ("greedy", GREEDY, Drafting(P, sampling=DRAWN), "draft_temperature=0"),
    ("typical", SAMPLED, Drafting(P, sampling=DRAWN), "draft_temperature=0"),
    ("typical", SAMPLED, Drafting(P, True), "chains only; set tree_nodes=0"),
    (
      "block",
      SAMPLED,
      Drafting(P, True, DRAWN),
      "no lossless form for trees of drawn drafts; use rule='token'",
    ),
  ],
)
def test_pairings_that_would_lie_are_refused(rule, sampling, drafting, message):
  with pytest.raises(ConfigError, match=message):
    Verifier(rule, sampling, P).check(drafting)


def test_every_other_pairing_is_taken():
  for rule in RULES:
    sampling = GREEDY if rule == "greedy" else SAMPLED
    Verifier(rule, sampling, P).check(Drafting(P))
  for rule in ("token", "block", "coupled"):
    Verifier(rule, GREEDY, P).check(Drafting(P))
    coupled = rule == "coupled"
    drawn = Drafting(P, sampling=DRAWN, is_coupled=coupled)
    Verifier(rule, SAMPLED, P).check(drawn)
  Verifier("token", SAMPLED, P).check(Drafting(P, True, DRAWN))


def test_odds_are_those_of_the_formulas():
  proposal = drawn_chain(3, None)
  probs = jax.nn.softmax(random_logits(3, P + 1))
  odds = np.asarray(rejection.token_odds(probs, proposal.tokens, proposal.law))
  for row in range(3):
    for i in range(P):
      token = int(proposal.tokens[row, i])
      ratio = probs[row, i, token] / proposal.law.probs[row, i, token]
      assert odds[row, i] == pytest.approx(min(1.0, float(ratio)), rel=1e-5)
