"""What every baseline must do: keep the tokens, remember the text, and no more.

`rehearse` plays a decode loop's part without a target: it offers a drafter a
text piece by piece, with wrong tokens behind the accepted ones.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dflash_jax.decode import Decoder
from dflash_jax.drafters import Borrowed, Drafter, NoDrafter
from dflash_jax.model import Model
from dflash_jax.proposal import Drafting, Moment, Proposal
from dflash_jax.sampling import GREEDY, Sampling
from dflash_jax.session import Session
from dflash_jax.target import Params
from dflash_jax.tree import chain
from dflash_jax.width import Fixed, Policy
from tests.testing import tiny_model, tiny_target_config

VOCAB = 13  # few, so that even wild drafts are right at times
DRAFTS = 3
LAW = Sampling(temperature=0.9, top_p=0.95)
DRAWN = Sampling(temperature=1.3)
CHAIN = Drafting(DRAFTS)
TREE = Drafting(17, is_tree=True)
PROMPTS = [[5, 9, 2, 5, 9], [7, 1, 1, 8, 3, 4, 11], [3]]
FOLLOW_UPS = [[2, 2], [12, 0, 7, 9], [6]]
BUDGETS = [[17, 9, 20], [5, 13, 1]]
NOTHING = Borrowed(jnp.zeros((VOCAB, 0)), jnp.zeros((0, VOCAB)), None)


def model_with(drafter: Drafter, params: Params) -> Model:
  """A random target of two layers, with this drafter."""
  target = tiny_target_config(VOCAB, num_layers=2)
  model = tiny_model(drafter=False, target=target)
  everything = dataclasses.replace(model.params, drafter=params)
  return dataclasses.replace(model, drafter=drafter, params=everything)


def decoder_of(
  model: Model,
  drafting: Drafting,
  sampling: Sampling = GREEDY,
  rule: str = "",
  policy: Policy | None = None,
) -> Decoder:
  """The model's loop; the rule is the lossless one unless it is named."""
  return dataclasses.replace(
    model.decoder(sampling),
    drafting=drafting,
    rule=rule or ("greedy" if sampling.is_greedy else "coupled"),
    policy=policy or Fixed(),
  )


def talk(
  model: Model, decoder: Decoder, rows: slice = slice(None)
) -> list[list[list[int]]]:
  """Replies of two turns, of some of the rows."""
  prompts = PROMPTS[rows]
  seeds = [3, 1, 159][rows]
  session = Session(
    model, decoder, len(prompts), capacity=64, max_new_tokens=20
  )
  first = session.reply(prompts, BUDGETS[0][rows], seeds=seeds)
  follow_ups = [
    [session.pending(row), *rest] for row, rest in enumerate(FOLLOW_UPS[rows])
  ]
  second = session.reply(follow_ups, BUDGETS[1][rows], seeds=seeds)
  return [[reply.tokens for reply in turn] for turn in (first, second)]


@functools.cache
def plain_talk(sampling: Sampling) -> list[list[list[int]]]:
  """What plain decoding makes of the same turns."""
  plain = model_with(NoDrafter(), {})
  return talk(plain, plain.decoder(sampling))


def check_rows_alone(drafter: Drafter, params: Params) -> None:
  """A row replies alone as in company, and the next compiles nothing new."""
  model = model_with(drafter, params)
  decoder = decoder_of(model, Drafting(2))
  plain = plain_talk(GREEDY)
  before = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
  for row, prompt in enumerate(PROMPTS):
    assert len(prompt) <= 16, "one bucket"
    alone = talk(model, decoder, slice(row, row + 1))
    assert alone == [turn[row : row + 1] for turn in plain]
    after = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
    assert np.subtract(after, before).tolist() == [1, 1]


def sharpen(params: Params) -> Params:
  """With laws that are sure enough for trees to grow deep."""
  head = {"kernel": 2.5 * params["head"]["kernel"]}
  return {**params, "head": head}


# --- A loop without a target --------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Script:
  """Texts, and what a target would have said of them.

  Attributes:
    texts: i32[B, L]. taps: f32[B, L, E].
    prefill: i32[B], tokens of the first piece.
    counts: i32[R, B], tokens that each round commits, 0 for a row that rests.
  """

  texts: np.ndarray
  taps: np.ndarray
  prefill: np.ndarray
  counts: np.ndarray

  @classmethod
  def write(cls, seed: int, tap_width: int, vocab: int = VOCAB) -> "Script":
    rng = np.random.default_rng(seed)
    B, L, R = 3, 29, 5
    counts = rng.integers(1, DRAFTS + 2, (R, B))
    counts[0, 0], counts[1, 0], counts[2, 1] = DRAFTS + 1, 1, 0
    return cls(
      texts=rng.integers(0, vocab, (B, L)).astype(np.int32),
      taps=rng.normal(size=(B, L, tap_width)).astype(np.float32),
      prefill=np.array([5, 3, 1]),
      counts=counts,
    )


@dataclasses.dataclass(frozen=True)
class Offer:
  """A proposal, and how many tokens of each row had been absorbed."""

  lengths: np.ndarray
  proposal: Proposal


@functools.cache
def compiled(drafter: Drafter):
  """`absorb` and `propose`, compiled once however many tests call them."""
  return (
    jax.jit(drafter.absorb),
    jax.jit(drafter.propose, static_argnums=4),
  )


def rehearse(
  drafter: Drafter,
  params: Params,
  script: Script,
  drafting: Drafting,
  vocab: int = VOCAB,
  keeper: Drafter | None = None,
) -> list[Offer]:
  """What the drafter offers in each round of a script.

  `keeper`, if given, absorbs in its place.
  """
  rng = np.random.default_rng(7)
  B = len(script.texts)
  _, propose = compiled(drafter)
  absorb, _ = compiled(keeper or drafter)

  def read(state, lengths, counts, size):
    """A pass over `size` tokens, of which `counts` turn out to be right."""
    places = np.minimum(lengths[:, None] + np.arange(size), 28)
    tokens = np.take_along_axis(script.texts, places, 1)
    taps = np.take_along_axis(script.taps, places[..., None], 1)
    wrong = np.arange(size) >= counts[:, None]
    tokens = np.where(wrong, (tokens + 1) % vocab, tokens)
    noise = rng.normal(size=taps.shape).astype(np.float32)
    taps = np.where(wrong[..., None], noise, taps)
    return absorb(params, state, taps, tokens, jnp.asarray(counts, jnp.int32))

  state = drafter.init_state(B, 40, "float32")
  lengths = np.zeros(B, np.int64)
  state = read(state, lengths, script.prefill, 6)
  lengths = lengths + script.prefill
  offers = []
  for counts in script.counts:
    proposal = propose(
      params,
      state,
      script.texts[np.arange(B), lengths],
      NOTHING,
      drafting,
      Moment(jnp.arange(B, dtype=jnp.uint32), jnp.asarray(lengths, jnp.int32)),
      jnp.full((B,), 99),
    )
    offers.append(Offer(lengths, jax.device_get(proposal)))
    state = read(state, lengths, counts, DRAFTS + 1)
    lengths = lengths + counts
  return offers


def paths(script: Script, offer: Offer):
  """Of each node of each row: (row, node, tokens of its ancestors)."""
  proposal = offer.proposal
  tree = proposal.tree or jax.device_get(chain(*proposal.tokens.shape))
  for row, parents in enumerate(tree.parents):
    above: list[list[int]] = [[]]
    for node, parent in enumerate(parents):
      yield row, node, above[parent]
      above.append([*above[parent], int(proposal.tokens[row, node])])


def questions(script: Script, offers: list[Offer]):
  """Each node's place, and its text: committed tokens, anchor, ancestors.

  Returns:
    A list of (offer, row, node), texts i32[N, L + D], rows i64[N], lengths
    i64[N] of what was committed, and depths i64[N] of the node, from 1.
  """
  where, texts, facts = [], [], []
  for number, offer in enumerate(offers):
    for row, node, above in paths(script, offer):
      length = offer.lengths[row]
      text = np.zeros(script.texts.shape[1] + 8, np.int32)
      known = [*script.texts[row, : length + 1], *above]
      text[: len(known)] = known
      where.append((number, row, node))
      texts.append(text)
      facts.append((row, length, len(above) + 1))
  rows, lengths, depths = np.array(facts).T
  return where, np.stack(texts), rows, lengths, depths


def worst_confidence(
  script: Script, offers: list[Offer], laws: np.ndarray, columns=None
) -> float:
  """Farthest that a certain node's confidence lies from the truth.

  Args:
    script: that was played.
    offers: made to it.
    laws: f64[N, V'], of the token at each node of `questions`.
    columns: column of each token; by default its id.
  """
  where, *_ = questions(script, offers)
  errors = []
  for (number, row, node), law in zip(where, laws, strict=True):
    proposal = offers[number].proposal
    token = proposal.tokens[row, node]
    column = token if columns is None else columns[token]
    errors.append(abs(law[column] - proposal.confidence[row, node]))
  return max(errors)


def worst_law(script: Script, offers: list[Offer], laws: np.ndarray) -> float:
  """Farthest that the stated law of a drawn draft lies from the truth."""
  where, _, _, _, depths = questions(script, offers)
  return max(
    np.abs(offers[number].proposal.law.probs[row, depth - 1] - law).max()
    for (number, row, _), depth, law in zip(where, depths, laws, strict=True)
  )
