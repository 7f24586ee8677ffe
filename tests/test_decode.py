"""The loop under every rule, tree and width policy: what it emits is right.

Drafters here are random networks, so almost all drafts are wrong, and an Oracle
that knows the reply, so that long runs are accepted too.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import decode, proposal, verify
from dflash_jax.config import ConfigError
from dflash_jax.decode import Decoder
from dflash_jax.drafters import DFlash
from dflash_jax.noise import Stream
from dflash_jax.proposal import Drafting, Proposal, chain
from dflash_jax.sampling import GREEDY, Sampling
from dflash_jax.session import Session
from dflash_jax.tree import Tree
from dflash_jax.width import BURST, Fixed, Goodput, Threshold
from pallas_kernels.block_verify import rule as block_rule
from tests.testing import BLOCK_SIZE, Oracle, tiny_model, tiny_target_config

VOCAB = 67
K = BLOCK_SIZE
LAW = Sampling(temperature=0.9, top_p=0.95)
PROMPTS = [[5, 9, 2], [7, 1, 1, 8, 30, 4, 11], [3], [60, 2, 2, 9, 5]]
BUDGETS = [23, 17, 29, 1]


def reply(model, decoder, seeds=(3, 1, 4, 159), prompts=PROMPTS):
  session = Session(
    model=model,
    decoder=decoder,
    batch=len(prompts),
    capacity=64,
    max_new_tokens=max(BUDGETS),
  )
  return session.reply(
    prompts, BUDGETS[: len(prompts)], seeds=list(seeds)[: len(prompts)]
  )


def plain_tokens(model, sampling):
  plain = model.without_drafter()
  decoder = plain.decoder(sampling)
  return [c.tokens for c in reply(plain, decoder)]


def decoder_of(model, **settings):
  decoder = model.decoder(settings.pop("sampling", None))
  return dataclasses.replace(decoder, **settings)


TREE = Drafting(11, is_tree=True)
DRAWN = Sampling(temperature=1.3)


# --- Tokens -------------------------------------------------------------------


CERTAIN = [
  (Drafting(K - 1), Fixed(2), GREEDY),
  (Drafting(K - 1), Threshold(0.02), LAW),
  (Drafting(K - 1), Goodput(), GREEDY),
  (Drafting(K - 1, sampling=DRAWN, is_coupled=True), Fixed(), LAW),
  (TREE, Fixed(), GREEDY),
  (TREE, Fixed(5), LAW),
  (dataclasses.replace(TREE, sampling=DRAWN, is_coupled=True), Fixed(), LAW),
]
# Each with the other law, too.
OTHERS = [
  pytest.param(*rest, law, marks=pytest.mark.slow)
  for *rest, law in (
    *((*rest, GREEDY if law is LAW else LAW) for *rest, law in CERTAIN),
    (TREE, Goodput(), LAW),
    (TREE, Goodput(), GREEDY),
  )
]


@pytest.mark.parametrize(
  ("drafting", "policy", "sampling"),
  [*CERTAIN, *OTHERS],
  ids=lambda value: type(value).__name__,
)
def test_certain_drafts_give_the_tokens_of_plain_decoding(
  drafting, policy, sampling
):
  """Whatever the drafter, tree, width and batch."""
  model = tiny_model(VOCAB)
  rule = "greedy" if sampling.is_greedy else "coupled"
  decoder = decoder_of(
    model, sampling=sampling, drafting=drafting, policy=policy, rule=rule
  )
  expected = plain_tokens(model, sampling)
  replies = reply(model, decoder)
  assert [c.tokens for c in replies] == expected
  assert [len(tokens) for tokens in expected] == BUDGETS
  for row, prompt in enumerate(PROMPTS[:2]):  # the batch does not matter
    session = Session(model, decoder, 1, capacity=64, max_new_tokens=32)
    seed = (3, 1)[row]
    alone = session.reply([prompt], BUDGETS[row : row + 1], seeds=[seed])
    assert alone[0].tokens == expected[row]


@dataclasses.dataclass(frozen=True)
class TreeOracle(Oracle):
  """Knows the reply; offers it as the second branch of a tree.

  The first branch is wrong from its first node on, so that the path to commit
  is never the first rows.
  """

  max_drafts: int = 3

  def propose(
    self, params, state, anchor, borrowed, drafting, moment, remaining
  ) -> Proposal:
    right = super().propose(
      params, state, anchor, borrowed, Drafting(3), moment, remaining
    )
    B = anchor.shape[0]
    wrong = (right.tokens + 1) % VOCAB
    order = [wrong[:, 0], right.tokens[:, 0], wrong[:, 1]]
    order += [right.tokens[:, 1], right.tokens[:, 2]]
    shape = Tree(
      parents=jnp.tile(jnp.array([0, 0, 1, 2, 4]), (B, 1)),
      depths=jnp.tile(jnp.array([1, 1, 2, 2, 3]), (B, 1)),
      ranks=jnp.tile(jnp.array([0, 1, 0, 1, 0]), (B, 1)),
    )
    return dataclasses.replace(chain(jnp.stack(order, 1)), tree=shape)


def knowing_model(sampling, drafter):
  """A model whose drafter knows what plain decoding will say."""
  model = tiny_model(VOCAB)
  expected = plain_tokens(model, sampling)
  texts = np.zeros((len(PROMPTS), 64), np.int32)
  for row, (prompt, tokens) in enumerate(zip(PROMPTS, expected, strict=True)):
    texts[row, : len(prompt) + len(tokens)] = [*prompt, *tokens]
  params = dataclasses.replace(
    model.params, drafter={"text": jnp.asarray(texts)}
  )
  model = dataclasses.replace(model, drafter=drafter, params=params)
  return model, expected


@pytest.mark.parametrize("sampling", [GREEDY, LAW], ids=["greedy", "sampled"])
def test_an_accepted_branch_is_committed_in_place_of_its_siblings(sampling):
  model, expected = knowing_model(sampling, TreeOracle())
  rule = "greedy" if sampling.is_greedy else "coupled"
  decoder = decoder_of(
    model,
    sampling=sampling,
    drafting=Drafting(5, is_tree=True),
    policy=Fixed(),
    rule=rule,
  )
  replies = reply(model, decoder)
  assert [c.tokens for c in replies] == expected
  for completion, budget in zip(replies, BUDGETS, strict=True):
    assert completion.rounds == -(-(budget - 1) // 4)  # 3 drafts + 1 a round
    assert completion.slots[1:4] == [1, 2, 3][: budget - 1]


def test_a_policy_that_rests_still_gives_the_tokens(monkeypatch):
  """Bursts absorb what they read, so later drafts are those of no burst."""

  @dataclasses.dataclass(frozen=True)
  class Alternate(Fixed):
    """One drafted round, then one burst."""

    rests = True

    def init_state(self, num_depths):
      return jnp.int32(0)

    def should_draft(self, state, costs):
      return state % 2 == 0

    def observe(self, state, outcome, costs):
      return state + 1

    def rest(self, state):
      return state + 1

    def widths(self, num_nodes):
      return (0, num_nodes)

    def choose(self, state, *signals):
      return jnp.int32(1)

  model, expected = knowing_model(GREEDY, Oracle())
  decoder = decoder_of(
    model, drafting=Drafting(K - 1), policy=Alternate(), sampling=GREEDY
  )
  replies = reply(model, decoder)
  assert [c.tokens for c in replies] == expected
  longest = replies[2]
  assert longest.slots[1 : K + 1] == [*range(1, K), 0]
  assert longest.slots[K + 1 : K + 1 + BURST] == [0] * BURST
  assert longest.slots[K + 1 + BURST] == 1
  # A drafted round of K tokens, 8 plain ones, and so on: 28 after the first.
  assert longest.rounds == 1 + BURST + 1 + BURST + 1
  assert longest.width == pytest.approx(3 * (K - 1) / longest.rounds)


# --- Laws ---------------------------------------------------------------------

TINY = 5  # tokens of the law tests
LENGTH = 3  # tokens after the prompt whose joint law is tested
ROWS, PASSES = 4_000, 25


@pytest.fixture(scope="module")
def tiny():
  """A model of five tokens, with a drafter of broad laws."""
  return tiny_model(target=tiny_target_config(TINY))


def joint_law(model, prompt, sampling) -> np.ndarray:
  """f64[V, V, V] of the next three tokens, from separate full passes."""
  texts = [
    [*prompt, *rest]
    for rest in itertools.product(range(TINY), repeat=LENGTH - 1)
  ]
  cache = model.target.init_cache(len(texts), 16)
  hidden, _, _ = model.target.forward(
    model.params.target, jnp.asarray(texts, jnp.int32), cache
  )
  logits = model.target.logits(model.params.target, hidden)
  weights = np.asarray(verify.weigh(logits, sampling), np.float64)
  laws = weights / weights.sum(-1, keepdims=True)
  laws = laws[:, len(prompt) - 1 :].reshape(TINY, TINY, LENGTH, TINY)
  first, second = laws[0, 0, 0], laws[:, 0, 1]
  return first[:, None, None] * second[:, :, None] * laws[:, :, 2]


def count_replies(model, decoder, prompt, passes=PASSES) -> np.ndarray:
  """i64[V, V, V], how often each reply of three tokens was drawn."""
  counts = np.zeros((TINY,) * LENGTH, np.int64)
  tokens = np.tile(np.array(prompt, np.int32), (ROWS, 1))
  capacity = len(prompt) + LENGTH + decoder.slack(len(prompt))
  for number in range(passes):
    state = decoder.begin(
      decoder.init_state(ROWS, capacity, LENGTH),
      np.full(ROWS, LENGTH),
      np.arange(ROWS, dtype=np.uint32) + ROWS * number,
    )
    state = decoder.prefill(
      model.params,
      state,
      tokens,
      np.full(ROWS, len(prompt)),
      np.ones(ROWS, bool),
    )
    while not bool(state.done.all()):
      run = decoder.run_rounds if state.drafts else decoder.run_plain
      state = run(model.params, state)
    np.add.at(counts, tuple(np.asarray(state.tokens[:, :LENGTH]).T), 1)
  return counts


def chi_squared(counts: np.ndarray, law: np.ndarray) -> float:
  """In standard deviations above its mean; rare replies are pooled."""
  draws = counts.sum()
  expected, seen = law.ravel() * draws, counts.ravel()
  rare = expected < 10
  expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
  seen = np.append(seen[~rare], seen[rare].sum())
  freedom = len(expected) - 1
  statistic = ((seen - expected) ** 2 / expected).sum()
  return (statistic - freedom) / np.sqrt(2 * freedom)


RULES = {
  "plain": ("coupled", Drafting(0)),
  "coupled": ("coupled", Drafting(2, sampling=DRAWN, is_coupled=True)),
  "coupled tree": ("coupled", Drafting(6, is_tree=True)),
  "token": ("token", Drafting(2, sampling=DRAWN)),
  "token, draft top-k": ("token", Drafting(2, sampling=Sampling(1.0, 3))),
  "block": ("block", Drafting(2, sampling=DRAWN)),
  "token tree": ("token", Drafting(6, is_tree=True, sampling=DRAWN)),
}


ALL = Fixed()
QUICK = ("coupled tree", "token", "block")


def law_decoder(model, rule, drafting, policy=ALL):
  model = model if drafting.num_nodes else model.without_drafter()
  return model, decoder_of(
    model, sampling=LAW, rule=rule, drafting=drafting, policy=policy
  )


@pytest.mark.optimized
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in RULES
  ],
)
def test_replies_follow_the_targets_law(tiny, name):
  """1e5 replies of the whole loop against the joint law of three tokens."""
  model, decoder = law_decoder(tiny, *RULES[name])
  counts = count_replies(model, decoder, [2, 0, 3])
  assert counts.sum() == ROWS * PASSES
  assert chi_squared(counts, joint_law(tiny, [2, 0, 3], LAW)) < 5


@pytest.mark.optimized
def test_widths_that_follow_the_drafts_keep_the_law(tiny):
  """Threshold cuts drawn drafts by the shape of their laws (DSpark, app. A)."""
  rule, drafting = RULES["token"]
  model, decoder = law_decoder(tiny, rule, drafting, Threshold(0.3))
  counts = count_replies(model, decoder, [2, 0, 3])
  assert chi_squared(counts, joint_law(tiny, [2, 0, 3], LAW)) < 5


def planted_error(model, rule, drafting, prompt=(2, 0, 3)) -> float:
  jax.clear_caches()
  _, decoder = law_decoder(model, rule, drafting)
  counts = count_replies(model, decoder, list(prompt), passes=10)
  jax.clear_caches()
  return chi_squared(counts, joint_law(model, list(prompt), LAW))


@pytest.mark.optimized
def test_reused_draft_noise_is_caught(tiny, monkeypatch):
  """Replacing a rejected draft with the noise that drew it (vLLM #35461)."""

  def reused(stream, depths):
    return jnp.full_like(depths, Stream.RECOVERY)

  monkeypatch.setattr(proposal.noise, "at_depth", reused)
  assert planted_error(tiny, *RULES["token"]) > 8


@pytest.mark.optimized
def test_noise_that_a_later_round_meets_again_is_caught(tiny, monkeypatch):
  """Drafts drawn by position: the block rule has looked at them already."""

  def by_position(probs, moment, depths, count):
    times = proposal.noise.race_times(
      Stream.DRAFT,
      moment.seeds[:, None],
      moment.positions[:, None] + depths - 1,
      probs.shape[2],
    )
    return (probs / times).argmax(-1)[..., None].astype(jnp.int32)

  monkeypatch.setattr(proposal, "_draw", by_position)
  assert planted_error(tiny, *RULES["block"]) > 8


@pytest.mark.optimized
def test_the_token_rules_decision_in_the_block_rule_is_caught(
  tiny, monkeypatch
):
  """Stopping at the first failure of h_i (vllm-ascend #7807)."""
  monkeypatch.setattr(block_rule, "find_last", block_rule.count_leading)
  assert planted_error(tiny, *RULES["block"]) > 8


@pytest.mark.optimized
def test_raw_draft_laws_are_caught(tiny, monkeypatch):
  """Drawing at one temperature, stating the law of another (HF #47932)."""
  real = verify.block_verify

  def raw(target, draft, *arguments, **keywords):
    stated = jax.nn.softmax(1.3 * jnp.log(draft))
    return real(target, stated, *arguments, **keywords)

  monkeypatch.setattr(verify, "block_verify", raw)
  assert planted_error(tiny, *RULES["token"]) > 8


# --- Known bugs that cost speed or tokens, not the law ------------------------


def drafts_at_every_round(model, decoder) -> list[list[int]]:
  """What the drafter offers in each round of one greedy reply."""
  session = Session(model, decoder, 1, capacity=64, max_new_tokens=16)
  session.reply([PROMPTS[1]], [1], seeds=[0])
  state = decoder.begin(session._new_state(), np.array([16]), np.zeros(1))
  tokens = np.zeros((1, 16), np.int32)
  tokens[0, : len(PROMPTS[1])] = PROMPTS[1]
  state = decoder.prefill(
    model.params, state, tokens, np.array([len(PROMPTS[1])]), np.array([True])
  )
  offers = []
  while not bool(state.done.all()):
    offers.append(offer_of(model, decoder, state))
    state = decoder.run_rounds(model.params, state)
  return offers


def offer_of(model, decoder, state) -> list[int]:
  offer = jax.jit(decoder.drafter.propose, static_argnums=4)(
    model.params.drafter,
    state.drafter,
    state.anchor,
    model.params.borrowed,
    Drafting(K - 1),
    decode.Moment(state.seeds, state.cache.length),
    jnp.array([100]),
  )
  return offer.tokens[0].tolist()


def fresh_offers(model, decoder) -> list[list[int]]:
  """What a drafter offers that has just read the text, for every length."""
  tokens = reply(model, decoder, prompts=[PROMPTS[1]])[0].tokens
  text = np.array([*PROMPTS[1], *tokens], np.int32)
  first = len(PROMPTS[1])
  anchors = jnp.arange(first, len(text))  # the anchor's place; all before: read
  rows = jnp.asarray(np.tile(text, (len(anchors), 1)))

  @jax.jit
  def offer(params):
    cache = model.target.init_cache(*rows.shape)
    drafter = model.drafter
    _, taps, _ = model.target.forward(params.target, rows, cache, drafter.taps)
    state = drafter.init_state(*rows.shape, "float32")
    state = drafter.absorb(params.drafter, state, taps, rows, anchors)
    return drafter.propose(
      params.drafter,
      state,
      jnp.take_along_axis(rows, anchors[:, None], axis=1)[:, 0],
      params.borrowed,
      Drafting(K - 1),
      decode.Moment(jnp.zeros(len(anchors), jnp.uint32), anchors),
      jnp.full_like(anchors, 100),
    ).tokens

  return np.asarray(offer(model.params)).tolist()


def offers_agree(model) -> bool:
  """Whether the loop's drafter knows what one that starts afresh knows."""
  decoder = decoder_of(
    model,
    sampling=GREEDY,
    drafting=Drafting(K - 1),
    policy=Fixed(),
    rounds_per_dispatch=1,
  )
  seen = drafts_at_every_round(model, decoder)
  fresh = fresh_offers(model, decoder)
  return len(seen) > 3 and all(offer in fresh for offer in seen)


def test_drafts_in_the_loop_are_those_of_a_drafter_that_reads_afresh():
  assert offers_agree(tiny_model(VOCAB))


@pytest.mark.parametrize(
  "bug",
  [
    pytest.param("inflated length", marks=pytest.mark.slow),
    pytest.param("uncropped cache", marks=pytest.mark.slow),
    "taps",
  ],
)
def test_a_drafter_that_keeps_the_wrong_context_is_caught(bug, monkeypatch):
  """Silent losses of acceptance that other engines have had."""
  real = DFlash.absorb

  def wrong(self, params, state, taps, tokens, count):
    if bug == "inflated length":  # rejected rows counted as context
      count = jnp.where(count > 0, tokens.shape[1], 0)
    if bug == "uncropped cache":  # rows written where others already are
      state = dataclasses.replace(state, length=state.length + 1)
    if bug == "taps":  # off by one
      taps = jnp.roll(taps, 1, axis=1)
    return real(self, params, state, taps, tokens, count)

  jax.clear_caches()
  model = tiny_model(VOCAB)
  expected = plain_tokens(model, GREEDY)
  with monkeypatch.context() as patch:
    patch.setattr(DFlash, "absorb", wrong)
    decoder = decoder_of(
      model,
      sampling=GREEDY,
      drafting=Drafting(K - 1),
      policy=Fixed(),
      rounds_per_dispatch=1,
    )
    seen = drafts_at_every_round(model, decoder)
    assert [c.tokens for c in reply(model, decoder)] == expected
  jax.clear_caches()
  fresh = fresh_offers(model, decoder)
  assert not all(offer in fresh for offer in seen)


def test_a_pairing_that_is_not_lossless_cannot_be_built():
  model = tiny_model(VOCAB)
  with pytest.raises(ConfigError, match="block"):
    decoder_of(
      model,
      sampling=LAW,
      rule="block",
      drafting=dataclasses.replace(TREE, sampling=DRAWN),
    )


def test_decoder_is_hashable_and_equal_by_value():
  first, second = (
    decoder_of(tiny_model(VOCAB), policy=Goodput()) for _ in range(2)
  )
  assert isinstance(first, Decoder)
  assert hash(first) == hash(second) and first == second
