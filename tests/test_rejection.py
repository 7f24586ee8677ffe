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

from dflash_jax import rejection
from dflash_jax.proposal import Law, Proposal, chain
from dflash_jax.tree import best_first, look_up

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

  @property
  def inputs(self):
    """What the rules' odds are functions of."""
    return self.probs, self.proposal.tokens, self.proposal.law

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


def outcomes(rule: str, chains: Chains):
  """Chances f64[N, K + 1] of each tau, and laws of the next token."""
  N = len(chains.chances)
  if rule == "token":
    odds = jax.jit(rejection.token_odds)(*chains.inputs)
    weights = np.ones((N, K + 1))
    odds = np.asarray(odds, np.float64)
    taus = [
      odds[:, :tau].prod(1) * (1 - odds[:, tau] if tau < K else 1)
      for tau in range(K + 1)
    ]
  else:
    odds, weights = jax.jit(rejection.block_odds)(*chains.inputs)
    odds = np.asarray(odds, np.float64)
    taus = [
      (odds[:, tau - 1] if tau else 1) * (1 - odds[:, tau:]).prod(1)
      for tau in range(K + 1)
    ]
  residual = jax.jit(rejection.residual)
  laws = []
  for tau in range(K + 1):
    left = residual(
      chains.probs[:, tau],
      jnp.asarray(weights, jnp.float32)[:, tau],
      chains.proposal.law,
      jnp.full((N,), tau),
    )
    left = np.asarray(left, np.float64)
    laws.append(left / left.sum(-1, keepdims=True))
  return np.stack(taus, 1), np.stack(laws, 1)


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


def chain_emissions(rule: str, chains: Chains):
  taus, laws = outcomes(rule, chains)
  drafts = np.asarray(chains.proposal.tokens)
  for n, chance in enumerate(chains.chances):
    for tau in range(K + 1):
      start = tuple(drafts[n, :tau].tolist())
      for token, p in enumerate(laws[n, tau]):
        if chance * taus[n, tau] * p > 0:
          yield chance * taus[n, tau] * p, (*start, token)


def expected_accepted(rule: str, chains: Chains) -> float:
  taus, _ = outcomes(rule, chains)
  return float((chains.chances[:, None] * taus * np.arange(K + 1)).sum())


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("name", CASES)
def test_the_law_of_a_chain_is_the_targets(rule, name):
  chains = Chains.create(CASES[name])
  law = output_law(chains.case, chain_emissions(rule, chains))
  np.testing.assert_allclose(law, target_law(chains.case), atol=EXACT)


@pytest.mark.parametrize("name", CASES)
def test_the_block_rule_accepts_at_least_as_much_as_the_token_rule(name):
  chains = Chains.create(CASES[name])
  block, token = (
    expected_accepted(rule, chains) for rule in ("block", "token")
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
    block, token = (
      expected_accepted(rule, chains) for rule in ("block", "token")
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


def law_error(rule: str, chains: Chains) -> float:
  law = output_law(chains.case, chain_emissions(rule, chains))
  return float(np.abs(law - target_law(chains.case)).max())


@pytest.fixture
def chains():
  return Chains.create(CASES["by depth, V=4"])


def test_a_residual_without_the_drafters_law_is_caught(chains, monkeypatch):
  monkeypatch.setattr(
    rejection, "residual", lambda probs, scale, law, depth: probs
  )
  assert law_error("token", chains) > 100 * EXACT


def test_raw_draft_probabilities_are_caught(chains):
  """Drafting from a processed law while stating the raw one (HF #47932)."""
  law = chains.proposal.law
  raw = jax.nn.softmax(2 * jnp.log(law.probs))
  proposal = dataclasses.replace(
    chains.proposal, law=dataclasses.replace(law, probs=raw)
  )
  for rule in ("token", "block"):
    wrong = dataclasses.replace(chains, proposal=proposal)
    assert law_error(rule, wrong) > 100 * EXACT


def test_cumulative_products_in_the_block_rule_are_caught(chains, monkeypatch):
  """h_i = P_i for every i (vllm-ascend #7839) draws from another law."""

  def wrong(probs, tokens, law):
    ratios = rejection.token_odds(probs, tokens, law)
    weights = jnp.cumprod(ratios, axis=1)
    return weights, jnp.pad(weights, ((0, 0), (1, 0)), constant_values=1.0)

  monkeypatch.setattr(rejection, "block_odds", wrong)
  assert law_error("block", chains) > 100 * EXACT
