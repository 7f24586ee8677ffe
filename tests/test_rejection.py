"""The law of every rejection rule, enumerated: it is the target's.

On tiny vocabularies every draft, every decision and every replacement is
weighed by its probability. The functions are the very ones a round runs.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import rejection, verify
from dflash_jax.proposal import Law, Proposal, chain
from dflash_jax.tree import best_first, look_up
from pallas_kernels.block_verify import rule as rules
from pallas_kernels.block_verify.reference import XlaPasses

K = 3  # drafts of a chain, depths of a tree
EXACT = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
  """Laws of a target and of a drafter.

  Attributes:
    target: of each prefix, f64[V] of the next token.
    draft: likewise, f64[V'] over `ids`.
    ids: token of each column, or None.
  """

  target: dict[tuple[int, ...], np.ndarray]
  draft: dict[tuple[int, ...], np.ndarray]
  ids: np.ndarray | None

  @property
  def vocab(self) -> int:
    return len(self.target[()])

  def tokens(self) -> list[int]:
    """Tokens that can be drafted, in column order."""
    return list(range(self.vocab) if self.ids is None else self.ids)


def prefixes(vocab: int, length: int):
  for size in range(length + 1):
    yield from itertools.product(range(vocab), repeat=size)


def make_case(seed: int, vocab: int, ids=None, kind: str = "random") -> Case:
  """A random case; `kind` says how the drafter relates to the target."""
  rng = np.random.default_rng(seed)
  columns = vocab if ids is None else len(ids)

  def law(size, sharp):
    return rng.dirichlet(np.full(size, sharp))

  target = {p: law(vocab, 0.7) for p in prefixes(vocab, K)}
  by_depth = [law(columns, 0.7) for _ in range(K)]
  draft = {}
  for prefix in prefixes(vocab, K - 1):
    if kind == "random":  # as a drafter with a Markov head
      draft[prefix] = law(columns, 0.7)
    elif kind == "same":
      draft[prefix] = target[prefix]
    elif kind == "sparse":  # a draft top-k
      some = law(columns, 0.7) * (np.arange(columns) != seed % columns)
      draft[prefix] = some / some.sum()
    else:  # depths are independent, as DFlash's
      draft[prefix] = by_depth[len(prefix)]
  return Case(target, draft, None if ids is None else np.array(ids))


CASES = {
  "random, V=3": make_case(0, 3),
  "random, V=4": make_case(1, 4),
  "by depth, V=4": make_case(2, 4, kind="depth"),
  "the target's own": make_case(3, 3, kind="same"),
  "some never drafted": make_case(4, 4, kind="sparse"),
  "trimmed head": make_case(5, 4, ids=(0, 2, 3)),
  "trimmed, by depth": make_case(6, 4, ids=(1, 3), kind="depth"),
}


def with_law(tokens, laws, columns, ids) -> Proposal:
  """A chain i32[N, K] with its laws f[N, K, V'] and drawn columns."""
  return dataclasses.replace(
    chain(jnp.asarray(tokens, jnp.int32)),
    law=Law(
      probs=jnp.asarray(laws, jnp.float32),
      ids=None if ids is None else jnp.asarray(ids, jnp.int32),
      ranked=jnp.asarray(columns, jnp.int32)[..., None],
    ),
  )


@dataclasses.dataclass(frozen=True)
class Chains:
  """Every chain that a case can draft, and how likely each is."""

  case: Case
  proposal: Proposal
  probs: jax.Array
  chances: np.ndarray

  @classmethod
  def create(cls, case: Case) -> "Chains":
    drafted = case.tokens()
    columns = np.array(list(itertools.product(range(len(drafted)), repeat=K)))
    tokens = np.array(drafted)[columns]
    laws, probs, chances = [], [], []
    for token, column in zip(tokens, columns, strict=True):
      path = [tuple(token[:i].tolist()) for i in range(K + 1)]
      laws.append([case.draft[p] for p in path[:K]])
      probs.append([case.target[p] for p in path])
      chances.append(np.prod([laws[-1][i][column[i]] for i in range(K)]))
    kept = np.array(chances) > 0
    return cls(
      case,
      with_law(tokens[kept], np.array(laws)[kept], columns[kept], case.ids),
      jnp.asarray(np.array(probs)[kept], jnp.float32),
      np.array(chances)[kept],
    )


def outcomes(rule: str, chains: Chains, way: str):
  """Chances f64[N, K + 1] of each tau, and laws of the next token."""
  odds, scales, weights = WAYS[way](rule, chains)
  odds = np.asarray(odds, np.float64)
  if rule == "token":
    taus = [
      odds[:, :tau].prod(1) * (1 - odds[:, tau] if tau < K else 1)
      for tau in range(K + 1)
    ]
  else:
    taus = [
      (odds[:, tau - 1] if tau else 1) * (1 - odds[:, tau:]).prod(1)
      for tau in range(K + 1)
    ]
  laws = []
  for tau in range(K + 1):
    left = np.asarray(weights(tau, scales[:, tau]), np.float64)
    laws.append(left / left.sum(-1, keepdims=True))
  return np.stack(taus, 1), np.stack(laws, 1)


def by_columns(rule: str, chains: Chains):
  """The decode loop's way with a trimmed head.

  Returns:
    Odds f32[N, K], scales f32[N, K + 1], and a function of tau and its scales:
    f32[N, V], proportional to the law of the token after tau drafts.
  """
  N, V = len(chains.chances), chains.case.vocab
  law = chains.proposal.law
  if law.ids is None:
    law = dataclasses.replace(law, ids=jnp.arange(V))
  inputs = chains.probs, chains.proposal.tokens, law
  if rule == "token":
    odds, scales = rejection.token_odds(*inputs), jnp.ones((N, K + 1))
  else:
    odds, scales = rejection.block_odds(*inputs)

  def weights(tau, scale):
    depth = jnp.full((N,), tau)
    return rejection.residual(chains.probs[:, tau], scale, law, depth)

  return odds, scales, weights


def by_block_verify(rule: str, chains: Chains, *, as_logits: bool = False):
  """The way with a whole one: block_verify's reference, on either law form."""
  target, draft = chains.probs, chains.proposal.law.probs
  temperatures = (None, None)
  if as_logits:
    target, draft = 0.7 * jnp.log(target), 1.3 * jnp.log(draft)
    temperatures = (0.7, 1.3)
  settings = rules.Rule(rule, *temperatures, verify.STREAMS)
  passes = XlaPasses(settings, target, draft, None, None)
  softmaxes = passes.measure()
  odds, scales = rules.weigh(
    settings, passes, softmaxes, target, draft, chains.proposal.tokens
  )

  def weights(tau, scale):
    accepted = jnp.full((len(target),), tau)
    ending = rules.end(settings, accepted, scale, *softmaxes)
    return passes.last_weights(ending)

  return odds, scales, weights


WAYS = {
  "columns": by_columns,
  "probabilities": by_block_verify,
  "logits": functools.partial(by_block_verify, as_logits=True),
}


def ways(case: Case) -> list[str]:
  """Those that a case's drafts can go."""
  return list(WAYS) if case.ids is None else ["columns"]


def output_law(case: Case, emitted) -> np.ndarray:
  """f64[V, ..., V] of K + 1 tokens; after a round the target goes on alone.

  Args:
    case: whose target it is.
    emitted: (chance, tokens) of each thing a round can emit.
  """
  table = np.zeros((case.vocab,) * (K + 1))

  def add(chance, tokens):
    if len(tokens) == K + 1:
      table[tokens] += chance
      return
    for token, p in enumerate(case.target[tokens]):
      add(chance * p, (*tokens, token))

  for chance, tokens in emitted:
    add(chance, tokens)
  return table


def target_law(case: Case) -> np.ndarray:
  return output_law(case, [(1.0, ())])


def chain_emissions(rule: str, chains: Chains, way: str):
  taus, laws = outcomes(rule, chains, way)
  drafts = np.asarray(chains.proposal.tokens)
  for n, chance in enumerate(chains.chances):
    for tau in range(K + 1):
      start = tuple(drafts[n, :tau].tolist())
      for token, p in enumerate(laws[n, tau]):
        if chance * taus[n, tau] * p > 0:
          yield chance * taus[n, tau] * p, (*start, token)


def expected_accepted(rule: str, chains: Chains, way: str) -> float:
  taus, _ = outcomes(rule, chains, way)
  return float((chains.chances[:, None] * taus * np.arange(K + 1)).sum())


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("name", CASES)
def test_the_law_of_a_chain_is_the_targets(rule, name):
  chains = Chains.create(CASES[name])
  for way in ways(chains.case):
    law = output_law(chains.case, chain_emissions(rule, chains, way))
    np.testing.assert_allclose(law, target_law(chains.case), atol=EXACT)


@pytest.mark.parametrize("name", CASES)
def test_the_block_rule_accepts_at_least_as_much_as_the_token_rule(name):
  chains = Chains.create(CASES[name])
  for way in ways(chains.case):
    block, token = (
      expected_accepted(rule, chains, way) for rule in ("block", "token")
    )
    assert block >= token - EXACT
    if name == "random, V=4":
      assert block > token + 0.01


def test_the_block_rule_equals_the_token_rule_on_certain_drafts():
  for seed in range(3):
    case = make_case(seed, 4)
    certain = {p: np.eye(4)[law.argmax()] for p, law in case.draft.items()}
    chains = Chains.create(dataclasses.replace(case, draft=certain))
    assert len(chains.chances) == 1
    for way in ways(case):
      block, token = (
        expected_accepted(rule, chains, way) for rule in ("block", "token")
      )
      assert block == pytest.approx(token, abs=EXACT)


# --- Trees --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Siblings:
  """All ordered draws of a case's depths, times all decisions.

  Attributes:
    decisions: bool[N, P]. chances: f64[N], of the draws alone.
  """

  case: Case
  proposal: Proposal
  probs: jax.Array
  decisions: np.ndarray
  chances: np.ndarray


def draw_all(case: Case, num_nodes: int, seed: int) -> Siblings:
  """A tree whose shape ignores the draws, labelled in every possible way."""
  drafted = case.tokens()
  columns = len(drafted)
  rng = np.random.default_rng(seed)
  scores = np.log(np.sort(rng.dirichlet(np.ones(columns), K), axis=1)[:, ::-1])
  shape, _ = best_first(jnp.asarray(scores[None], jnp.float32), num_nodes)
  laws = np.array([case.draft[(0,) * d] for d in range(K)])
  orders = list(itertools.permutations(range(columns)))
  ranked, chances = [], []
  for draw in itertools.product(orders, repeat=K):
    chance = 1.0
    for law, order in zip(laws, draw, strict=True):
      left = 1.0
      for column in order:
        chance *= law[column] / left if left > 1e-12 else 1.0
        left -= law[column]
    ranked.append(draw)
    chances.append(chance)
  decisions = np.array(list(itertools.product([False, True], repeat=num_nodes)))
  N, M = len(ranked), len(decisions)
  shape = jax.tree.map(lambda x: jnp.repeat(x, N * M, axis=0), shape)
  ranked = jnp.repeat(jnp.asarray(ranked, jnp.int32), M, axis=0)
  tokens = jnp.asarray(drafted, jnp.int32)[look_up(shape, ranked)]
  law = Law(
    probs=jnp.asarray(np.tile(laws, (N * M, 1, 1)), jnp.float32),
    ids=None if case.ids is None else jnp.asarray(case.ids, jnp.int32),
    ranked=ranked,
  )
  proposal = dataclasses.replace(chain(tokens), tree=shape, law=law)
  return Siblings(
    case,
    proposal,
    jnp.asarray(rows_of(case, proposal), jnp.float32),
    np.tile(decisions, (N, 1)),
    np.repeat(chances, M),
  )


def rows_of(case: Case, proposal: Proposal) -> np.ndarray:
  """f64[N, P + 1, V]: the target's law after the anchor and each node."""
  tokens, parents = np.asarray(proposal.tokens), proposal.tree.parents[0]
  N, P = tokens.shape
  rows = np.zeros((N, P + 1, case.vocab))
  for n in range(N):
    paths = [()]
    for node in range(P):
      paths.append((*paths[int(parents[node])], int(tokens[n, node])))
    rows[n] = [case.target[path] for path in paths]
  return rows


def tree_emissions(siblings: Siblings):
  """Of each draw and decision: its chance, and what is emitted."""
  num_nodes = siblings.decisions.shape[1]
  walk = functools.partial(
    rejection.accept_siblings, max_depth=min(K, num_nodes)
  )
  # Draws that force a decision: below any odds but 0, or above all.
  draws = np.where(siblings.decisions, 1e-30, 2.0).astype(np.float32)
  drafted = siblings.proposal
  path, accepted, weights, odds = map(
    np.asarray, jax.jit(walk)(siblings.probs, drafted.tree, drafted.law, draws)
  )
  odds = odds.astype(np.float64)
  weights = weights.astype(np.float64)
  laws = weights / weights.sum(-1, keepdims=True)
  offered = odds >= 0
  # Decisions about nodes that are never offered are one and the same.
  canonical = ~(siblings.decisions & ~offered).any(1)
  chance = np.where(siblings.decisions, odds, 1 - odds)
  chance = siblings.chances * np.where(offered, chance, 1.0).prod(1)
  tokens = np.pad(np.asarray(siblings.proposal.tokens), ((0, 0), (1, 0)))
  for n in np.flatnonzero(canonical & (chance > 0)):
    start = tuple(tokens[n, path[n, 1 : accepted[n] + 1]].tolist())
    for token, p in enumerate(laws[n]):
      if p > 0:
        yield chance[n] * p, (*start, token)


@pytest.mark.parametrize("num_nodes", [2, 5])
@pytest.mark.parametrize(
  "case",
  [
    make_case(7, 3, kind="depth"),
    make_case(8, 4, ids=(0, 1, 3), kind="depth"),
    dataclasses.replace(
      make_case(9, 3, kind="depth"),
      draft={p: np.array([0.7, 0.3, 0.0]) for p in prefixes(3, K - 1)},
    ),
  ],
  ids=["V=3", "trimmed", "sparse"],
)
def test_the_law_of_a_tree_of_siblings_is_the_targets(case, num_nodes):
  siblings = draw_all(case, num_nodes, seed=num_nodes)
  law = output_law(case, tree_emissions(siblings))
  np.testing.assert_allclose(law, target_law(case), atol=EXACT)


# --- Known bugs, planted ------------------------------------------------------


def law_error(rule: str, chains: Chains, way: str) -> float:
  law = output_law(chains.case, chain_emissions(rule, chains, way))
  return float(np.abs(law - target_law(chains.case)).max())


@pytest.fixture
def chains():
  return Chains.create(CASES["by depth, V=4"])


def test_a_residual_without_the_drafters_law_is_caught(chains, monkeypatch):
  monkeypatch.setattr(
    rejection, "residual", lambda probs, scale, law, depth: probs
  )
  assert law_error("token", chains, "columns") > 100 * EXACT
  real = rules.end
  monkeypatch.setattr(
    rules,
    "end",
    lambda *args: real(*args[:-1], args[-1]._replace(share=args[-1].share * 0)),
  )
  assert law_error("token", chains, "logits") > 100 * EXACT


def test_raw_draft_probabilities_are_caught(chains):
  """Drafting from a processed law while stating the raw one (HF #47932)."""
  law = chains.proposal.law
  raw = jax.nn.softmax(2 * jnp.log(law.probs))
  proposal = dataclasses.replace(
    chains.proposal, law=dataclasses.replace(law, probs=raw)
  )
  wrong = dataclasses.replace(chains, proposal=proposal)
  for rule in ("token", "block"):
    for way in WAYS:
      assert law_error(rule, wrong, way) > 100 * EXACT


@pytest.mark.parametrize("way", WAYS)
def test_cumulative_products_in_the_block_rule_are_caught(
  chains, monkeypatch, way
):
  """h_i = P_i for every i (vllm-ascend #7839) draws from another law."""
  monkeypatch.setattr(rules, "block_odds", lambda excess, weights: weights)
  assert law_error("block", chains, way) > 100 * EXACT


@pytest.mark.parametrize("way", WAYS)
def test_products_that_are_not_capped_at_one_are_caught(
  chains, monkeypatch, way
):
  monkeypatch.setattr(
    rules, "block_weights", lambda ratios: jnp.cumprod(ratios, axis=1)
  )
  assert law_error("block", chains, way) > 100 * EXACT
