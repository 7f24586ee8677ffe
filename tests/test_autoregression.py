"""Chains and trees of drafters that read their own last token.

A table of logits by whole path stands for the drafter, and plain Python, path
by path, for the truth.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import noise, proposal
from dflash_jax.autoregression import BEAM, draft_chain, draft_tree
from dflash_jax.noise import Stream
from dflash_jax.proposal import Drafting, Moment
from dflash_jax.sampling import Sampling

V, D, B = 5, 4, 3
IDS = np.array([0, 2, 4])
SAMPLED = Sampling(temperature=1.3)
ANCHORS = np.array([3, 0, 4])


@dataclasses.dataclass(frozen=True)
class Table:
  """A drafter whose logits are looked up by all tokens it has read.

  Attributes:
    logits: per depth, f32[V^(depth + 1), V'], by path in base V, the anchor
      first.
  """

  logits: list[np.ndarray]

  @classmethod
  def create(cls, columns: int, seed: int = 0) -> "Table":
    rng = np.random.default_rng(seed)
    return cls(
      [
        rng.normal(size=(V ** (depth + 1), columns)).astype(np.float32) * 2
        for depth in range(D)
      ]
    )

  def __call__(self, carry, tokens, parents, depth):
    """The step."""
    carry = jnp.take_along_axis(carry, parents, axis=1) * V + tokens
    return carry, jnp.asarray(self.logits[depth])[carry]

  def row(self, path: list[int]) -> np.ndarray:
    """f64[V'] of what follows a path, the anchor first."""
    place = 0
    for token in path:
      place = place * V + token
    return self.logits[len(path) - 1][place].astype(np.float64)


def moment(batch: int = B) -> Moment:
  seeds = jnp.arange(batch, dtype=jnp.uint32) + 7
  return Moment(seeds, 11 + jnp.arange(batch, dtype=jnp.int32))


def scores_of(drafting: Drafting, where: Moment, row: int, path, logits, ids):
  """f64[V'], the log of a law that the likeliest draft tops."""
  if drafting.sampling.is_greedy:
    scores = logits
  else:  # by the race that the target's own choice runs
    position = where.positions[row] + len(path)
    times = noise.race_times(Stream.CHOICE, where.seeds[row], position, V)
    times = np.asarray(times, np.float64)[ids]
    scores = logits / drafting.sampling.temperature - np.log(times)
  scores = scores - scores.max()
  return scores - np.log(np.exp(scores).sum())


CERTAIN = {
  "greedy": Drafting(D),
  "coupled": Drafting(D, sampling=SAMPLED, is_coupled=True),
}


def heads():
  """Tables over the whole vocabulary and over a trimmed one."""
  return [(Table.create(V), None), (Table.create(len(IDS), 1), IDS)]


def chain_of(table, ids, drafting, where, anchors=ANCHORS):
  given = None if ids is None else jnp.asarray(ids, jnp.int32)
  carry = jnp.zeros((len(anchors), 1), jnp.int32)
  anchor = jnp.asarray(anchors, jnp.int32)
  return draft_chain(table, carry, anchor, given, drafting, where, V)


def tree_of(table, ids, drafting, where, max_depth=D):
  given = None if ids is None else jnp.asarray(ids, jnp.int32)
  carry = jnp.zeros((B, 1), jnp.int32)
  anchor = jnp.asarray(ANCHORS, jnp.int32)
  return draft_tree(
    table, carry, anchor, given, drafting, where, V, max_depth=max_depth
  )


# --- Chains -------------------------------------------------------------------


@pytest.mark.parametrize("kind", CERTAIN)
@pytest.mark.parametrize("head", heads(), ids=["whole", "trimmed"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_certain_chain_follows_its_own_best_tokens(kind, head, count):
  table, ids = head
  drafting = dataclasses.replace(CERTAIN[kind], num_nodes=count)
  drafted = chain_of(table, ids, drafting, moment())
  assert drafted.tree is None and drafted.law is None
  names = np.arange(V) if ids is None else ids
  for row in range(B):
    path = [int(ANCHORS[row])]
    for depth in range(count):
      scores = scores_of(drafting, moment(), row, path, table.row(path), names)
      best, second = np.sort(scores)[::-1][:2]
      assert int(drafted.tokens[row, depth]) == names[scores.argmax()]
      margin = float(drafted.margins[row, depth])
      assert margin == pytest.approx(best - second, abs=1e-4)
      confidence = float(drafted.confidence[row, depth])
      assert confidence == pytest.approx(np.exp(best), abs=1e-5)
      path.append(int(names[scores.argmax()]))


@pytest.mark.parametrize("head", heads(), ids=["whole", "trimmed"])
def test_a_drawn_chain_states_the_law_of_each_draw(head):
  """Given the drafts before it; of other paths nothing is asked."""
  table, ids = head
  drafted = chain_of(table, ids, Drafting(3, sampling=SAMPLED), moment())
  names = np.arange(V) if ids is None else ids
  assert drafted.law.probs.shape == (B, 3, len(names))
  for row in range(B):
    path = [int(ANCHORS[row])]
    for depth in range(3):
      scores = table.row(path) / SAMPLED.temperature
      law = np.exp(scores) / np.exp(scores).sum()
      np.testing.assert_allclose(drafted.law.probs[row, depth], law, atol=1e-6)
      confidence = float(drafted.confidence[row, depth])
      assert confidence == pytest.approx(law.max(), abs=1e-6)
      token = int(drafted.tokens[row, depth])
      column = int(drafted.law.ranked[row, depth, 0])
      assert names[column] == token
      path.append(token)


ROWS = 20_000


def frequency_error(table) -> float:
  """Chi-squared of two drawn tokens against their joint law, in deviations."""
  drafting = Drafting(2, sampling=SAMPLED)
  anchors = np.full(ROWS, 3)
  tokens = np.asarray(
    jax.jit(
      lambda where: chain_of(table, None, drafting, where, anchors).tokens
    )(moment(ROWS))
  )
  counts = np.zeros((V, V))
  np.add.at(counts, tuple(tokens.T), 1)

  def law(path):
    scores = table.row(path) / SAMPLED.temperature
    return np.exp(scores) / np.exp(scores).sum()

  joint = np.stack([law([3, token]) for token in range(V)])
  expected = ROWS * law([3])[:, None] * joint
  statistic = ((counts - expected) ** 2 / expected).sum()
  freedom = V * V - 1
  return (statistic - freedom) / np.sqrt(2 * freedom)


def test_drawn_tokens_follow_the_joint_law():
  assert frequency_error(Table.create(V)) < 5


def test_noise_shared_between_depths_is_caught(monkeypatch):
  monkeypatch.setattr(
    proposal.noise,
    "at_depth",
    lambda stream, depths: jnp.full_like(depths, stream),
  )
  assert frequency_error(Table.create(V)) > 50


def test_a_chain_that_reads_the_wrong_token_is_caught():
  """Shifted by one: every step reads the token before the last."""
  table = Table.create(V)
  right = chain_of(table, None, CERTAIN["greedy"], moment())
  late = []

  def shifted(carry, tokens, parents, depth):
    late.append(tokens)
    return table(carry, late[max(depth - 1, 0)], parents, depth)

  wrong = chain_of(shifted, None, CERTAIN["greedy"], moment())
  assert (right.tokens != wrong.tokens).any()


# --- Trees --------------------------------------------------------------------


def best_tree(table, ids, drafting, row, max_depth):
  """The likeliest nodes of a beam: {path: log probability}, and each lead."""
  names = np.arange(V) if ids is None else ids
  anchor = (int(ANCHORS[row]),)
  count = drafting.num_nodes
  depths = min(max_depth, count)
  beam = max(BEAM, -(-count // depths))
  going, seen, leads = {anchor: 0.0}, {}, {}
  for _ in range(depths):
    grown = {}
    for path, above in going.items():
      scores = scores_of(drafting, moment(), row, path, table.row(path), names)
      order = np.argsort(-scores)[:beam]
      for column in order:
        child = (*path, int(names[column]))
        grown[child] = above + scores[column]
        others = np.delete(scores, column)
        leads[child] = scores[column] - others.max()
    seen |= grown
    best = sorted(grown, key=grown.get, reverse=True)[:beam]
    going = {path: grown[path] for path in best}
  nodes = sorted(seen, key=seen.get, reverse=True)[:count]
  return {path: seen[path] for path in nodes}, leads


def paths_of(drafted, row) -> list[tuple[int, ...]]:
  """The path of every node, the anchor first."""
  paths = [(int(ANCHORS[row]),)]
  for node, parent in enumerate(np.asarray(drafted.tree.parents[row])):
    assert parent <= node  # parents come first
    paths.append((*paths[parent], int(drafted.tokens[row, node])))
    assert len(paths[-1]) == int(drafted.tree.depths[row, node]) + 1
  return paths[1:]


TREES = [(1, D), (3, 1), (7, 2), (40, D)]


def tree_is_right(table, ids, drafting, step=None, max_depth=D) -> bool:
  """Whether nodes, order, confidence and margins are those of the beam."""
  drafted = tree_of(step or table, ids, drafting, moment(), max_depth)
  for row in range(B):
    expected, leads = best_tree(table, ids, drafting, row, max_depth)
    paths = paths_of(drafted, row)
    if paths != list(expected):
      return False
    for node, path in enumerate(paths):
      above = expected.get(path[:-1], 0.0)
      confidence = np.exp(expected[path] - above)
      stated = float(drafted.confidence[row, node])
      assert stated == pytest.approx(confidence, abs=1e-5)
      margin = float(drafted.margins[row, node])
      assert margin == pytest.approx(leads[path], abs=1e-4)
  return True


@pytest.mark.parametrize(("count", "max_depth"), TREES)
@pytest.mark.parametrize("kind", CERTAIN)
def test_a_tree_is_the_likeliest_part_of_a_beam(kind, count, max_depth):
  drafting = dataclasses.replace(CERTAIN[kind], num_nodes=count, is_tree=True)
  assert tree_is_right(Table.create(V), None, drafting, max_depth=max_depth)


@pytest.mark.parametrize("kind", CERTAIN)
def test_a_tree_over_a_trimmed_head_names_tokens_by_their_ids(kind):
  drafting = dataclasses.replace(CERTAIN[kind], num_nodes=11, is_tree=True)
  assert tree_is_right(Table.create(len(IDS), 1), IDS, drafting)


def test_siblings_rank_in_the_order_of_their_nodes():
  """Then any first part of a tree is one, and a rank says who comes first."""
  drafting = Drafting(40, is_tree=True)
  drafted = tree_of(Table.create(V), None, drafting, moment())
  assert (np.asarray(drafted.tree.parents) <= np.arange(40)).all()
  for row in range(B):
    seen: dict[int, list[int]] = {}
    parents, ranks = drafted.tree.parents[row], drafted.tree.ranks[row]
    for parent, rank in zip(parents.tolist(), ranks.tolist(), strict=True):
      seen.setdefault(parent, []).append(rank)
    assert all(got == list(range(len(got))) for got in seen.values())


def test_a_tree_that_loses_its_parents_is_caught():
  """The state of the first path in place of the parent's own."""
  table = Table.create(V)

  def orphan(carry, tokens, parents, depth):
    return table(carry, tokens, jnp.zeros_like(parents), depth)

  drafting = Drafting(13, is_tree=True)
  assert tree_is_right(table, None, drafting)
  assert not tree_is_right(table, None, drafting, step=orphan)


def test_tokens_that_cannot_be_drafted_come_last():
  """A selector gives all but a few tokens no chance at all."""
  table = Table.create(V)
  logits = [
    np.where(x < np.sort(x)[:, -2:-1], -np.inf, x) for x in table.logits
  ]
  table = Table(logits)
  drafted = tree_of(table, None, Drafting(14, is_tree=True), moment())
  for row in range(B):
    paths = paths_of(drafted, row)
    possible = [
      all(
        np.isfinite(table.row(list(path[:i]))[path[i]])
        for i in range(1, len(path))
      )
      for path in paths
    ]
    assert all(possible)  # 2 + 4 + 8 of them
  assert np.isfinite(np.asarray(drafted.confidence)).all()


def test_a_tree_of_more_nodes_than_there_are_is_refused():
  table = Table.create(len(IDS), 1)
  with pytest.raises(ValueError, match="num_nodes is 13.* 12 nodes"):
    tree_of(table, IDS, Drafting(13, is_tree=True), moment(), max_depth=2)
