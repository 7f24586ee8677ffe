"""N-gram look-up against a search in Python, and in the decode loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import model as model_lib
from dflash_jax.config import (
  Config,
  ConfigError,
  DecodeConfig,
  DraftConfig,
  TargetSource,
)
from dflash_jax.drafters import NGram
from dflash_jax.drafters.ngram import History
from dflash_jax.proposal import Drafting
from dflash_jax.sampling import GREEDY
from dflash_jax.width import Threshold
from tests.drafters.baselines import (
  CHAIN,
  DRAFTS,
  DRAWN,
  LAW,
  TREE,
  Script,
  check_rows_alone,
  decoder_of,
  model_with,
  plain_talk,
  rehearse,
  talk,
)
from tests.testing import tiny_target_config

DRAWN_CHAIN = dataclasses.replace(CHAIN, sampling=DRAWN)


def look_up(text, count, max_match, min_match):
  """Drafts and length of the match, found by searching backwards."""
  text = list(map(int, text))
  for size in range(min(max_match, len(text) - 1), min_match - 1, -1):
    for start in range(len(text) - size - 1, -1, -1):
      if text[start : start + size] == text[-size:]:
        grown = list(text)
        for place in range(start + size, start + size + count):
          grown.append(grown[place])
        return grown[len(text) :], size
  return [text[-1]] * count, 0


def offer(drafter, texts, count):
  """Proposal to rows whose last token is the anchor."""
  size = max(map(len, texts)) + 3
  known = np.full((len(texts), size), 9, np.int32)  # 9: void, must not be seen
  for row, text in enumerate(texts):
    known[row, : len(text) - 1] = text[:-1]
  lengths = jnp.array([len(text) - 1 for text in texts])
  return jax.jit(drafter.propose, static_argnums=4)(
    {},
    History(jnp.asarray(known), lengths),
    jnp.array([text[-1] for text in texts]),
    None,
    Drafting(count),
    None,
    None,
  )


@pytest.mark.parametrize(
  ("alphabet", "max_match", "min_match", "count"),
  [(2, 4, 1, 5), (3, 3, 2, 7), (5, 1, 1, 3), (4, 7, 3, 2)],
)
def test_drafts_are_those_of_a_backward_search(
  alphabet, max_match, min_match, count
):
  rng = np.random.default_rng(alphabet)
  texts = [
    rng.integers(0, alphabet, rng.integers(1, 43)).tolist() for _ in range(197)
  ]
  drafter = NGram(count, max_match, min_match)
  found = offer(drafter, texts, count)
  sizes = []
  for row, text in enumerate(texts):
    drafts, size = look_up(text, count, max_match, min_match)
    assert found.tokens[row].tolist() == drafts, text
    trusted = size + np.arange(count)
    expected = trusted / (trusted + 1) if size else np.zeros(count)
    np.testing.assert_allclose(found.confidence[row], expected, rtol=1e-6)
    sizes.append(size)
  assert {0, min_match} <= set(sizes)


@pytest.mark.parametrize(
  ("text", "drafts", "size"),
  [
    ([4], [4, 4, 4, 4], 0),
    ([4, 4], [4, 4, 4, 4], 1),
    ([1, 2, 3], [3, 3, 3, 3], 0),
    ([1, 2, 3, 1], [2, 3, 1, 2], 1),  # runs past the end: as if periodic
    ([1, 2, 1, 2], [1, 2, 1, 2], 2),
    ([7, 1, 2, 5, 6, 0, 1, 2], [5, 6, 0, 1], 2),
    ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2, 4], 2),  # the latest of two
    ([5, 1, 2, 3, 1, 2, 4, 5, 1, 2], [3, 1, 2, 4], 3),  # the longest of two
    ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0], 4),  # overlaps itself
  ],
)
def test_edges(text, drafts, size):
  found = offer(NGram(4), [text], 4)
  assert found.tokens[0].tolist() == drafts
  assert look_up(text, 4, 4, 1) == (drafts, size)
  first = found.confidence[0, 0]
  assert first == pytest.approx(size / (size + 1))
  assert (found.margins[0, 0] == -jnp.inf) == (size == 0)


def offers_are_right(keeper) -> bool:
  script = Script.write(3, 0, vocab=3)
  right = True
  drafter = NGram(DRAFTS)
  for made in rehearse(drafter, {}, script, CHAIN, vocab=3, keeper=keeper):
    for row, length in enumerate(made.lengths):
      text = script.texts[row, : length + 1]
      drafts, _ = look_up(text, DRAFTS, 4, 1)
      right &= made.proposal.tokens[row].tolist() == drafts
  return right


def test_committed_tokens_and_they_alone_are_remembered():
  assert offers_are_right(NGram(DRAFTS))


@dataclasses.dataclass(frozen=True)
class OffByOne(NGram):
  """Remembers one token more than was committed."""

  def absorb(self, params, state, taps, tokens, count):
    return super().absorb(params, state, taps, tokens, count + (count > 0))


@dataclasses.dataclass(frozen=True)
class Inflated(NGram):
  """Remembers rejected drafts too."""

  def absorb(self, params, state, taps, tokens, count):
    count = jnp.where(count > 0, tokens.shape[1], 0)
    return super().absorb(params, state, taps, tokens, count)


@dataclasses.dataclass(frozen=True)
class Forgetful(NGram):
  """Writes each piece where the last one began."""

  def absorb(self, params, state, taps, tokens, count):
    start = jnp.maximum(state.length - 1, 0)
    wrong = super().absorb(
      params, History(state.tokens, start), taps, tokens, count
    )
    return History(wrong.tokens, state.length + count)


@pytest.mark.parametrize("planted", [OffByOne, Inflated, Forgetful])
def test_a_wrong_history_is_caught(planted):
  assert not offers_are_right(planted(DRAFTS))


@pytest.mark.parametrize(
  ("drafting", "sampling", "rule", "policy"),
  [
    (CHAIN, GREEDY, "greedy", None),
    (TREE, LAW, "coupled", None),  # asked for a tree, it offers a chain
    pytest.param(DRAWN_CHAIN, LAW, "token", None, marks=pytest.mark.slow),
    pytest.param(DRAWN_CHAIN, LAW, "block", None, marks=pytest.mark.slow),
    pytest.param(
      CHAIN, GREEDY, "greedy", Threshold(0.6), marks=pytest.mark.slow
    ),
  ],
  ids=["greedy", "coupled", "token", "block", "threshold"],
)
def test_replies_are_those_of_plain_decoding(drafting, sampling, rule, policy):
  """Over two turns; certain drafts make every rule the coupled one."""
  model = model_with(NGram(DRAFTS), {})
  decoder = decoder_of(model, drafting, sampling, rule, policy)
  expected = plain_talk(sampling)
  assert talk(model, decoder) == expected


def test_rows_alone_reply_as_in_company_and_compile_once():
  check_rows_alone(NGram(DRAFTS), {})


def test_config_names_it():
  config = Config(
    target=TargetSource(random=tiny_target_config(263)),
    drafter=DraftConfig(path="ngram", block_size=7),
    decode=DecodeConfig(block_size=3),
  )
  model = model_lib.load(config)
  assert model.drafter == NGram(6)
  assert model.decoder().drafter == NGram(2)


def test_impossible_lengths_are_named():
  with pytest.raises(ConfigError, match="min_match=3 and max_match=2"):
    NGram(4, max_match=2, min_match=3)
