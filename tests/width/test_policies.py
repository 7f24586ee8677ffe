"""Width policies: full argmax, online fit, rests, and simulated speed."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.config import ConfigError
from dflash_jax.tree import Tree
from dflash_jax.width import (
  BURST,
  Costs,
  Fixed,
  Goodput,
  Outcome,
  Threshold,
  goodput,
  parse_width,
  threshold,
)
from dflash_jax.width.base import MAX_PAUSE
from dflash_jax.width.goodput import Fit
from dflash_jax.width.threshold import PATIENCE

NO_COSTS = Costs(plain=jnp.array(1.0), rounds=jnp.zeros((0,)))
# Milliseconds of a drafted round by width; a plain pass takes PLAIN.
PLAIN = 15.0
TABLE = {0: 19.0, 1: 19.5, 2: 21.0, 3: 23.0, 5: 26.0, 7: 28.0}
COSTS = Costs(plain=jnp.array(PLAIN), rounds=jnp.array([*TABLE.values()]))


# --- Text and compiled widths -------------------------------------------------


@pytest.mark.parametrize(
  ("text", "policy"),
  [
    ("fixed:0", Fixed(0)),
    ("fixed:13", Fixed(13)),
    ("threshold:0.4", Threshold(0.4)),
    ("threshold:1e-3", Threshold(0.001)),
    ("goodput", Goodput()),
  ],
)
def test_text_names_a_policy(text, policy):
  assert parse_width(text) == policy
  assert hash(parse_width(text)) == hash(policy)


@pytest.mark.parametrize(
  "text",
  [
    *("", "fixed", "fixed:", "fixed:-1", "fixed:2.5", "fixed:²", "fixed:1:2"),
    *("threshold", "threshold:", "threshold:0", "threshold:1", "threshold:x"),
    *("threshold:nan", "goodput:", "goodput:3", "Goodput", "7"),
  ],
)
def test_bad_text_is_quoted_beside_the_three_forms(text):
  with pytest.raises(ConfigError) as error:
    parse_width(text)
  for part in (repr(text), "fixed:N", "threshold:T", "goodput"):
    assert part in str(error.value)


@pytest.mark.parametrize("num_nodes", [0, 1, 2, 5, 6, 7, 8, 9, 16, 31, 64])
@pytest.mark.parametrize("policy", [Threshold(0.5), Goodput()])
def test_widths_are_few_and_reach_from_none_to_all(policy, num_nodes):
  widths = policy.widths(num_nodes)
  assert list(widths) == sorted(set(widths))
  assert widths[0] == 0 and widths[-1] == num_nodes
  assert num_nodes < 1 or 1 in widths
  assert len(widths) <= (6 if num_nodes <= 8 else 8)


def test_a_fixed_width_is_capped_by_the_proposal_and_never_rests():
  assert Fixed(5).widths(3) == (3,)
  assert Fixed(2).widths(3) == (2,)
  assert Fixed().widths(3) == (3,)
  state = Fixed(5).init_state(3)
  assert jax.tree.leaves(state) == [] and Fixed(5).should_draft(state, NO_COSTS)
  assert choose(Fixed(5), state, np.zeros((2, 3))) == 0


# --- Helpers ------------------------------------------------------------------


def chains(rows: int, nodes: int) -> tuple[jax.Array, jax.Array]:
  """depths and parents i32[B, P] of chains."""
  parents = jnp.tile(jnp.arange(nodes, dtype=jnp.int32), (rows, 1))
  return parents + 1, parents


def trees(rng, rows: int, nodes: int) -> tuple[np.ndarray, np.ndarray]:
  """depths and parents i32[B, P] of random trees."""
  parents = rng.integers(0, np.arange(1, nodes + 1), size=(rows, nodes))
  depths = np.zeros((rows, nodes + 1), np.int32)
  for i in range(nodes):
    depths[:, i + 1] = depths[np.arange(rows), parents[:, i]] + 1
  return depths[:, 1:], parents.astype(np.int32)


def tree_of(depths, parents) -> Tree:
  """A tree as policies see it; ranks do not matter to them."""
  depths = jnp.asarray(depths)
  return Tree(jnp.asarray(parents), depths, jnp.zeros_like(depths))


def choose(policy, state, signal, active=None, costs=COSTS):
  """Of chains whose confidence and margins are both `signal` [B, P]."""
  signal = jnp.asarray(signal, jnp.float32)
  depths, parents = chains(*signal.shape)
  if active is None:
    active = jnp.ones(signal.shape[:1], bool)
  return policy.choose(
    state, signal, signal, tree_of(depths, parents), active, costs
  )


def outcome(rows: int = 2, nodes: int = 7, **fields) -> Outcome:
  """A round of active chains in which everything was rejected."""
  depths, _ = chains(rows, nodes)
  zeros = jnp.zeros((rows, nodes))
  blank = Outcome(
    index=jnp.array(1),
    emitted=jnp.ones((rows,), jnp.int32),
    active=jnp.ones((rows,), bool),
    tested=depths == 1,
    accepted=zeros.astype(bool),
    depths=depths,
    margins=zeros,
    confidence=zeros,
    entropy=jnp.ones((rows,)),
  )
  return dataclasses.replace(blank, **fields)


# --- The full argmax ----------------------------------------------------------


class EarlyStop(Goodput):
  """A planted bug: climbs from the narrowest width, stops at the first dip."""

  def rates(self, chance, parents, active, costs):
    rates = super().rates(chance, parents, active, costs)
    climbs = jnp.cumprod(jnp.diff(rates) > 0)
    return jnp.where(jnp.pad(climbs, (1, 0), constant_values=1), rates, 0)


class AllRows(Goodput):
  """A planted bug: rows that are done have a say."""

  def rates(self, chance, parents, active, costs):
    return super().rates(chance, parents, jnp.ones_like(active), costs)


def staircase_misses(policy, cases: int = 200) -> int:
  """Random cases in which the choice is not the best by brute force."""
  B, P, D = 3, 19, 5
  widths = policy.widths(P)
  run = jax.jit(policy.choose)
  rng = np.random.default_rng(7)
  misses = 0
  for _ in range(cases):
    depths, parents = trees(rng, B, P)
    depths = np.minimum(depths, D)
    margins = rng.normal(1, 3, size=(B, P)).astype(np.float32)
    active = rng.random(B) < 0.7
    active[rng.integers(B)] = True
    tile = rng.integers(2, 12)  # nodes per step of the staircase
    steps = rng.uniform(0, 6, size=-(-P // tile) + 1).cumsum() + 3
    costs = np.array([steps[-(-n // tile)] + 0.01 * n for n in widths])
    mean = rng.normal(0.3, 1, size=(D, 2)).astype(np.float32)
    state = policy.init_state(D)
    fit = dataclasses.replace(state.fit, mean=jnp.asarray(mean))
    index = run(
      dataclasses.replace(state, fit=fit),
      *(jnp.ones((B, P)), margins, tree_of(depths, parents), active),
      Costs(jnp.array(2.0), jnp.asarray(costs, jnp.float32)),
    )
    rates = []
    for n, cost in zip(widths, costs, strict=True):
      total = 0.0
      for b in np.flatnonzero(active):
        survival = [1.0]
        for i in range(n):
          w, bias = mean[depths[b, i] - 1]
          chance = 1 / (1 + np.exp(-(w * margins[b, i] + bias)))
          survival.append(survival[parents[b, i]] * chance)
        total += sum(survival)
      rates.append(total / cost)
    misses += rates[index] < max(rates) * (1 - 1e-5)
  return misses


def test_goodput_takes_the_best_width_of_staircase_costs():
  assert staircase_misses(Goodput()) == 0


@pytest.mark.parametrize("mutant", [EarlyStop, AllRows])
def test_the_staircases_catch_a_planted_bug(mutant):
  assert staircase_misses(mutant()) > 5


# --- Non-anticipation ---------------------------------------------------------


def test_no_policy_is_shown_a_drafted_token():
  for policy in (Fixed(3), Threshold(0.4), Goodput()):
    assert list(inspect.signature(policy.choose).parameters) == [
      *("state", "confidence", "margins", "nodes"),
      *("active", "costs"),
    ]
  assert "tokens" not in {f.name for f in dataclasses.fields(Outcome)}


@pytest.mark.parametrize("policy", [Threshold(0.4), Goodput()])
def test_what_a_round_shows_changes_only_later_rounds(policy):
  rounds, changed, B, P = 12, 5, 2, 7
  depths, parents = chains(B, P)
  rng = np.random.default_rng(3)
  margins = rng.normal(0.5, 2, size=(rounds, B, P)).astype(np.float32)
  active = jnp.ones((B,), bool)

  @jax.jit
  def play(lengths, entropy):
    def step(state, inputs):
      margins, length, entropy = inputs
      chance = jax.nn.sigmoid(margins)
      index = policy.choose(
        state, chance, margins, tree_of(depths, parents), active, COSTS
      )
      shown = outcome(
        index=index,
        emitted=length + 1,
        tested=depths <= length[:, None] + 1,
        accepted=depths <= length[:, None],
        margins=margins,
        confidence=chance,
        entropy=entropy,
      )
      return policy.observe(state, shown, COSTS), (index, state)

    inputs = (margins, lengths, entropy)
    return jax.lax.scan(step, policy.init_state(P), inputs)[1]

  lengths = rng.integers(0, 8, size=(rounds, B)).astype(np.int32)
  entropy = rng.uniform(0, 3, size=(rounds, B)).astype(np.float32)
  first, states = play(lengths, entropy)
  # Copies: a running dispatch may still read the arrays it was given.
  lengths, entropy = lengths.copy(), entropy.copy()
  lengths[changed] = 7 - lengths[changed]
  entropy[changed] += 9
  second, others = play(lengths, entropy)
  np.testing.assert_array_equal(first[: changed + 1], second[: changed + 1])
  differs = [
    not np.array_equal(a[changed + 1], b[changed + 1])
    for a, b in zip(*map(jax.tree.leaves, (states, others)), strict=True)
  ]
  assert any(differs)


# --- The online fit -----------------------------------------------------------


def fit_simulated(truth: np.ndarray, rows: int, rounds: int, seed: int):
  """A fit to rows whose node at depth d is accepted by truth[d - 1]."""
  D = truth.shape[0]
  depths, _ = chains(rows, D)

  @jax.jit
  def run(key):
    def step(fit, key):
      a, b = jax.random.split(key)
      margins = jax.random.gamma(a, 2.0, (rows, D)) * 1.5
      chance = jax.nn.sigmoid(truth[:, 0] * margins + truth[:, 1])
      right = jax.random.uniform(b, (rows, D)) < chance
      accepted = jnp.cumprod(right, axis=1).astype(bool)
      tested = jnp.pad(accepted[:, :-1], ((0, 0), (1, 0)), constant_values=True)
      shown = outcome(
        rows, D, tested=tested, accepted=accepted, margins=margins
      )
      return fit.update(shown, goodput.MEMORY), (margins, right)

    return jax.lax.scan(step, Fit.prior(D), jax.random.split(key, rounds))

  return run(jax.random.key(seed))


def test_the_fit_recovers_each_depth_and_beats_its_start():
  truth = np.array([(0.9, -1.1), (0.3, 0.6), (1.3, -2.5)], np.float32)
  fit, (margins, right) = fit_simulated(truth, rows=32, rounds=601, seed=2)
  # 100 rounds of memory with 32 rows: 3,200 nodes at depth 1, half of them at
  # depth 3. Three standard deviations of the estimates.
  np.testing.assert_allclose(fit.mean[:, 0], truth[:, 0], atol=0.25)
  np.testing.assert_allclose(fit.mean[:, 1], truth[:, 1], atol=0.5)

  def loss(fit):
    m, y = margins.reshape(-1, 3), right.reshape(-1, 3)
    p = fit.chance(m, jnp.tile(jnp.arange(1, 4), (m.shape[0], 1)))
    return -jnp.log(jnp.where(y, p, 1 - p)).mean(axis=0)

  best = Fit(jnp.asarray(truth), fit.precision)
  assert (loss(fit) < loss(Fit.prior(3)) - 0.005).all(), (
    "no gain over the start"
  )
  assert (loss(fit) < loss(best) + 0.005).all(), "far from the truth"


def test_one_row_is_enough_to_learn_that_drafts_are_bad():
  truth = np.array([(0.0, -3.0), (0.0, -3.0)], np.float32)
  fit, _ = fit_simulated(truth, rows=1, rounds=60, seed=4)
  chance = fit.chance(jnp.array([[3.0, 3.0]]), jnp.array([[1, 2]]))
  assert chance[0, 0] < 0.2


def test_a_certain_draft_that_fails_does_not_upset_the_fit():
  fit = Fit.prior(2)
  shown = outcome(1, 2, margins=jnp.full((1, 2), 1e6))
  update = jax.jit(Fit.update)
  for _ in range(30):
    before, fit = fit, update(fit, shown, goodput.MEMORY)
    assert np.abs(fit.mean - before.mean).max() < 2.0
  assert np.isfinite(fit.mean).all() and np.isfinite(fit.precision).all()
  assert fit.chance(jnp.array([[16.0]]), jnp.array([[1]])) < 0.3


def test_a_depth_without_tests_returns_to_the_optimistic_start():
  depths, _ = chains(3, 2)
  bad = outcome(3, 2, tested=jnp.ones((3, 2), bool), margins=depths * 1.0)
  shallow = dataclasses.replace(bad, tested=depths == 1)
  fit = Fit.prior(2)
  update = jax.jit(Fit.update)
  for _ in range(50):
    fit = update(fit, bad, goodput.MEMORY)
  learned = fit.chance(bad.margins, depths)[0]
  for _ in range(700):
    fit = update(fit, shallow, goodput.MEMORY)
  faded = fit.chance(bad.margins, depths)[0]
  start = Fit.prior(2).chance(bad.margins, depths)[0]
  assert learned[1] < 0.1 and faded[0] < 0.1
  np.testing.assert_allclose(faded[1], start[1], atol=0.05)


# --- Threshold ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("confidence", "expected"),
  [
    ([[0.3] * 7], 0),
    ([[0.5] + [0.9] * 6], 3),  # .5 .45 .405 .36: three nodes
    ([[0.9] * 7], 7),  # .9^7 = .478
    ([[1, 0.9, 0.7, 0.65, 0.5, 1, 1]], 5),  # four, rounded up
    ([[0.1] * 7, [0.9, 0.6, 0.1] + [0.9] * 4], 2),  # the longest row
  ],
)
def test_threshold_counts_leading_nodes_and_rounds_up(confidence, expected):
  policy = Threshold(0.4)
  index = choose(policy, policy.init_state(7), confidence)
  assert policy.widths(7)[index] == expected


def test_threshold_ignores_rows_that_are_done():
  policy = Threshold(0.4)
  confidence = [[0.1] * 7, [0.9] * 7]
  state = policy.init_state(7)
  assert choose(policy, state, confidence, jnp.array([True, False])) == 0
  assert choose(policy, state, confidence, jnp.array([False, False])) == 0


def effective(policy, entropy, accepts):
  """The threshold after long quiet history and five rounds of news."""
  observe = jax.jit(policy.observe)
  state = policy.init_state(7)
  for step in range(65):
    hit = step % 2 == 0 if step < 60 else accepts
    level = 1.0 if step < 60 else entropy
    shown = outcome(
      accepted=jnp.zeros((2, 7), bool).at[:, 0].set(hit),
      entropy=jnp.full((2,), level),
    )
    state = observe(state, shown, NO_COSTS)
  return policy.effective(state)


def test_threshold_follows_the_state_of_the_target():
  policy = Threshold(0.4)
  calm = effective(policy, entropy=0.5, accepts=True)
  only_entropy = effective(policy, entropy=2.0, accepts=True)
  worried = effective(policy, entropy=2.0, accepts=False)
  assert calm < 0.33 and worried > 0.55
  assert calm < only_entropy < worried
  assert policy.effective(policy.init_state(7)) == pytest.approx(0.4)
  extreme = effective(policy, entropy=1e4, accepts=False)
  assert extreme == pytest.approx(threshold.CEILING)


def test_threshold_starts_without_a_drift():
  policy = Threshold(0.4)
  state = policy.init_state(7)
  for _ in range(9):
    state = policy.observe(state, outcome(), NO_COSTS)
    assert policy.effective(state) == pytest.approx(0.4, abs=1e-5)


def test_a_raised_threshold_that_tests_nothing_falls_back():
  policy = Threshold(0.4)
  state = policy.init_state(7)
  hit = outcome(accepted=jnp.ones((2, 7), bool))
  for shown in [hit] * 50 + [outcome()] * 8:
    state = policy.observe(state, shown, NO_COSTS)
  raised = policy.effective(state)
  idle = outcome(index=jnp.array(0), tested=jnp.zeros((2, 7), bool))
  for _ in range(20):
    state = policy.rest(policy.observe(state, idle, NO_COSTS))
  assert raised > 0.6 and policy.effective(state) < 0.45


def pauses(policy, state, shown, drafted: int) -> tuple[list[int], object]:
  """Bursts before each of the next drafted rounds, all of which show this."""
  observe, rest = jax.jit(policy.observe), jax.jit(policy.rest)
  bursts = []
  for _ in range(drafted):
    count = 0
    while not policy.should_draft(state, COSTS):
      state, count = rest(state), count + 1
    bursts.append(count)
    state = observe(state, shown, COSTS)
  return bursts, state


def test_threshold_rests_longer_and_longer_and_returns():
  policy = Threshold(0.4)
  idle = outcome(index=jnp.array(0), tested=jnp.zeros((2, 7), bool))
  bursts, state = pauses(policy, policy.init_state(7), idle, PATIENCE + 6)
  assert bursts == [0] * PATIENCE + [1, 2, 4, 8, 8, 8] and MAX_PAUSE == 8
  bursts, state = pauses(policy, state, outcome(), 3)
  assert bursts == [8, 0, 0]  # the probe chose more than 0
  assert pauses(policy, state, idle, PATIENCE + 1)[0] == [0] * PATIENCE + [1]


# --- Goodput's rests ----------------------------------------------------------


def test_goodput_rests_longer_and_longer_while_drafts_do_not_pay():
  policy = Goodput()
  bursts, state = pauses(policy, policy.init_state(7), outcome(), 30)
  first = bursts.index(1)
  assert 5 <= first <= 10  # it starts out optimistic
  assert bursts[first : first + 5] == [1, 2, 4, 8, 8]
  good = outcome(
    index=jnp.array(5),
    emitted=jnp.full((2,), 7),
    tested=jnp.ones((2, 7), bool),
    accepted=jnp.ones((2, 7), bool),
  )
  bursts, state = pauses(policy, state, good, 9)
  assert bursts == [8] + [0] * 8
  assert state.pause == 0


def test_probing_costs_less_than_one_percent():
  policy, steps = Goodput(), 400
  costs = Costs(jnp.array(1.0), jnp.full((6,), 1.5))
  observe, rest = jax.jit(policy.observe), jax.jit(policy.rest)
  state, tokens, seconds = policy.init_state(7), 0, 0.0
  log = []
  for _ in range(steps):
    if policy.should_draft(state, costs):
      shown = outcome(5, emitted=jnp.array([2, 1, 1, 1, 1]))  # 1.2 a row
      state = observe(state, shown, costs)
      tokens, seconds = tokens + 1.2, seconds + 1.5
    else:
      state = rest(state)
      tokens, seconds = tokens + BURST, seconds + BURST
    log.append((tokens, seconds))
  (t0, s0), (t1, s1) = log[100], log[-1]
  assert (t1 - t0) / (s1 - s0) > 0.99


def test_cheaper_measured_rounds_end_a_rest_at_once():
  policy = Goodput()
  _, state = pauses(policy, policy.init_state(7), outcome(), 20)
  assert not policy.should_draft(state, COSTS)
  slower = dataclasses.replace(COSTS, plain=jnp.array(60.0))
  assert policy.should_draft(state, slower)


def test_a_probe_tests_drafts_even_where_the_fit_says_none():
  policy = Goodput()
  state = policy.init_state(7)
  bad = Fit(jnp.tile(jnp.array([0.0, -9.0]), (7, 1)), state.fit.precision)
  state = dataclasses.replace(state, fit=bad)
  signal = np.full((2, 7), 2.0)
  assert choose(policy, state, signal) == 0
  probing = dataclasses.replace(state, pause=jnp.array(4))
  assert choose(policy, probing, signal) == 1
  dear = Costs(jnp.array(PLAIN), jnp.array([30.0, 30.5, 31, 31.5, 32, 33]))
  assert choose(policy, probing, signal, costs=dear) == 2


@pytest.mark.parametrize("policy", [Threshold(0.4), Goodput()])
def test_rows_that_are_done_change_no_choice_and_no_state(policy):
  rng = np.random.default_rng(5)
  signal = rng.uniform(0, 1, size=(3, 7)).astype(np.float32)
  active = jnp.array([True, False, True])
  noisy = signal.copy()
  noisy[1] = 0.99
  state = policy.init_state(7)
  assert choose(policy, state, signal, active) == choose(
    policy, state, noisy, active
  )
  shown = outcome(3, active=active, margins=jnp.asarray(signal))
  other = outcome(
    3,
    active=active,
    margins=jnp.asarray(noisy),
    emitted=jnp.array([1, 99, 1]),
    tested=shown.tested.at[1].set(True),
    accepted=shown.accepted.at[1].set(True),
    entropy=jnp.array([1.0, jnp.nan, 1.0]),
  )
  first, second = (policy.observe(state, x, COSTS) for x in (shown, other))
  jax.tree.map(np.testing.assert_array_equal, first, second)
  nobody = dataclasses.replace(other, active=jnp.zeros((3,), bool))
  for leaf in jax.tree.leaves(policy.observe(state, nobody, COSTS)):
    assert np.isfinite(leaf).all()


# --- Simulated decoding -------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 2))
def simulate(policy, key, steps, before, after, switch, costs):
  """One row of 7-node chains whose drafts are right at a rate, not by margin.

  Returns f32[steps] each: tokens and time so far, width used (-1: a burst).
  """
  P = 7
  depths, parents = chains(1, P)
  widths = jnp.array(policy.widths(P))
  active = jnp.ones((1,), bool)

  def step(carry, key):
    state, tokens, seconds = carry

    def draft(state):
      for_margins, for_right = jax.random.split(key)
      margins = 3 + 2 * jax.random.normal(for_margins, (1, P))
      confidence = jax.nn.sigmoid(margins)
      index = policy.choose(
        state, confidence, margins, tree_of(depths, parents), active, costs
      )
      within = depths <= widths[index]
      rate = jnp.where(tokens < switch, before, after)
      right = (jax.random.uniform(for_right, (1, P)) < rate) & within
      accepted = jnp.cumprod(right, axis=1).astype(bool)
      reached = jnp.pad(accepted[:, :-1], ((0, 0), (1, 0)), constant_values=1)
      shown = outcome(
        1,
        index=index,
        emitted=accepted.sum(axis=1) + 1,
        tested=within & reached,
        accepted=accepted,
        margins=margins,
        confidence=confidence,
      )
      seen = policy.observe(state, shown, costs)
      return seen, shown.emitted[0] * 1.0, costs.rounds[index], widths[index]

    def burst(state):
      rested = policy.rest(state)
      return rested, BURST * 1.0, BURST * costs.plain, jnp.array(-1)

    state, emitted, spent, used = jax.lax.cond(
      policy.should_draft(state, costs), draft, burst, state
    )
    carry = (state, tokens + emitted, seconds + spent)
    return carry, (*carry[1:], used)

  start = (policy.init_state(P), jnp.zeros(()), jnp.zeros(()))
  return jax.lax.scan(step, start, jax.random.split(key, steps))[1]


RUNS = 12


def runs(policy, before, after=None, switch=0.0, steps=1100):
  """RUNS simulations: tokens, milliseconds and widths, [RUNS, steps] each."""
  table = [TABLE[n] for n in policy.widths(7)]
  costs = Costs(jnp.array(PLAIN), jnp.array(table))
  keys = jax.random.split(jax.random.key(11), RUNS)
  after = before if after is None else after
  play = jax.vmap(
    lambda key: simulate(policy, key, steps, before, after, switch, costs)
  )
  return tuple(map(np.asarray, play(keys)))


def speed(log, start: int = 0, stop: int = 1000) -> float:
  """Mean tokens per millisecond from the start-th to the stop-th token."""
  rates = []
  for tokens, seconds, _ in zip(*log, strict=True):
    i, j = np.searchsorted(tokens, [start, stop])
    rates.append((tokens[j] - tokens[i]) / (seconds[j] - seconds[i]))
  return float(np.mean(rates))


def best_fixed(rate: float) -> float:
  """Tokens per millisecond of the best fixed width, in expectation."""
  return max(
    sum(rate**i for i in range(n + 1)) / cost for n, cost in TABLE.items()
  )


def test_goodput_loses_three_percent_to_plain_decoding_at_worst():
  assert speed(runs(Goodput(), 0.05)) >= 0.97 / PLAIN


def test_goodput_is_as_fast_as_the_best_fixed_width():
  assert speed(runs(Goodput(), 0.9)) >= 0.98 * best_fixed(0.9)


def test_goodput_returns_to_drafting_when_drafts_become_good():
  log = runs(Goodput(), 0.05, 0.9, switch=500.0)
  waits = [
    tokens[(used == -1) & (tokens < 3000)].max() - 500
    for tokens, _, used in zip(*log, strict=True)
  ]
  # The longest pause, and then one probe in ten fails by bad luck.
  assert np.mean(waits) < 2 * BURST * MAX_PAUSE
  assert max(waits) < 5 * BURST * MAX_PAUSE
  assert speed(log, 800, 1800) >= 0.98 * best_fixed(0.9)


def test_goodput_stops_drafting_when_drafts_become_bad():
  log = runs(Goodput(), 0.9, 0.05, switch=500.0)
  assert speed(log, 500, 700) >= 0.8 / PLAIN
  assert speed(log, 700, 1500) >= 0.97 / PLAIN
