"""The losslessness ladder: what it confirms, and every fault it must see."""

import dataclasses

import pytest

from dflash_jax.config import EvalConfig
from dflash_jax.drafters import NGram
from dflash_jax.prompts import Prompt
from eval import ladder, speed
from tests.testing import tiny_model

# Turns of one batch end at different times; two batches.
PROMPTS = [Prompt(("abababab", "b")), Prompt(("cd",)), Prompt(("aabbaabb",))]
SETTINGS = EvalConfig(limit=0, max_new_tokens=23, batch_size=2)


def ngram_model(**decode):
  """A tiny target whose drafter looks up what was said before."""
  model = tiny_model(width="fixed:4", **decode)
  params = dataclasses.replace(model.params, drafter={})
  return dataclasses.replace(model, drafter=NGram(4), params=params)


@dataclasses.dataclass(frozen=True)
class Climb:
  """A model, and what it decoded both ways."""

  model: object
  batches: list
  comparisons: list

  @classmethod
  def of(cls, model):
    compared = speed.decode_both_ways(model, PROMPTS, SETTINGS)
    return cls(model, speed.plan(model, PROMPTS, SETTINGS), compared)

  def __call__(self, comparisons=None, model=None):
    return ladder.climb(
      model or self.model, self.batches, comparisons or self.comparisons
    )


@pytest.fixture(scope="module")
def greedy():
  """Decoded at temperature 0."""
  return Climb.of(ngram_model())


@pytest.fixture(scope="module")
def sampled():
  """Decoded at temperature 1, with a seed."""
  return Climb.of(ngram_model(temperature=1.0, seed=5))


def change_token(comparison, token):
  """The comparison, had its reply one other token."""
  reply = comparison.speculative
  tokens = [*reply.tokens]
  tokens[token] = (tokens[token] + 1) % 90
  return dataclasses.replace(
    comparison, speculative=dataclasses.replace(reply, tokens=tokens)
  )


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_every_token_of_every_turn_is_confirmed(name, request):
  climb = request.getfixturevalue(name)
  found = climb()
  assert found["dtype"] == "float32" and found["guarantee"] == "tokens"
  assert found["identical"] == found["replies"] == 4
  assert found["rows"] == 5
  assert found["differences"] == [] and found["median_gap"] is None
  replies = [each.speculative for each in climb.comparisons]
  assert found["rescored_tokens"] == sum(len(r.tokens) for r in replies)
  assert found["agreed_tokens"] == found["rescored_tokens"]
  if name == "greedy":  # rounds of several tokens are among them
    assert any(slot > 0 for reply in replies for slot in reply.slots)


def test_wrong_token_is_seen_and_those_after_it_are_still_read(greedy):
  changed = [*greedy.comparisons]
  changed[2] = change_token(changed[2], 9)
  found = greedy(changed)
  (difference,) = found["differences"]
  assert (difference["place"], difference["token"]) == (2, 9)
  assert difference["gap"] > ladder.TIE and not difference["tie"]
  assert found["identical"] == 3
  wrong = [(each["place"], each["token"]) for each in found["disagreements"]]
  assert wrong[0] == (2, 9)
  # Fed what was said, whatever it would say: one token, not all that follow.
  assert 1 <= len(wrong) < 10 and {place for place, _ in wrong} == {2}
  assert found["agreed_tokens"] == found["rescored_tokens"] - len(wrong)


def test_noise_of_another_seed_is_seen(sampled):
  other = dataclasses.replace(sampled.model.config.decode, seed=6)
  config = dataclasses.replace(sampled.model.config, decode=other)
  found = sampled(model=dataclasses.replace(sampled.model, config=config))
  assert found["agreed_tokens"] < 0.5 * found["rescored_tokens"]


def test_replies_of_another_prompt_are_seen(greedy):
  shuffled = [greedy.comparisons[n] for n in (2, 1, 0, 3)]
  found = greedy(shuffled)
  assert found["agreed_tokens"] < found["rescored_tokens"]


def test_a_near_tie_is_told_from_a_mistake(greedy, monkeypatch):
  changed = [*greedy.comparisons]
  changed[0] = change_token(changed[0], 3)
  monkeypatch.setattr(ladder, "TIE", 1e9)
  (difference,) = greedy(changed)["differences"]
  assert difference["tie"]


def test_law_alone_has_no_token_to_expect(greedy):
  drawn = [
    dataclasses.replace(each, guarantee="law") for each in greedy.comparisons
  ]
  found = greedy(drawn)
  assert "rescored_tokens" not in found and found["guarantee"] == "law"


@pytest.mark.parametrize(
  "slots, spans",
  [
    ([0], []),
    ([0, 0, 0], [(1, 2), (2, 3)]),
    ([0, 1, 2, 0, 0, 1], [(1, 4), (4, 5), (5, 6)]),  # cut in its last round
  ],
)
def test_rounds_end_with_the_targets_own_token(slots, spans):
  assert ladder.split_rounds(slots) == spans


def test_first_difference_may_be_where_one_ends(greedy):
  long = greedy.comparisons[0]
  short = dataclasses.replace(long.plain, tokens=long.plain.tokens[:7])
  assert ladder.find_first(dataclasses.replace(long, plain=short)) == 6
