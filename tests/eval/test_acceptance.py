"""Acceptance figures, against figures worked out by hand."""

import pytest

from dflash_jax.config import EvalConfig
from dflash_jax.generate import generate
from dflash_jax.prompts import Prompt
from dflash_jax.session import Completion
from eval import acceptance
from tests.testing import oracle_model, tiny_model


def completion(tokens, accepted, rounds=None):
  """A reply with `tokens` tokens after the first."""
  rounds = sum(accepted) if rounds is None else rounds
  return Completion(
    text="",
    tokens=[0] * (tokens + 1),
    slots=[0] * (tokens + 1),
    prompt_tokens=3,
    rounds=rounds,
    tau=tokens / rounds if rounds else 0.0,
    accepted=accepted,
    width=float(len(accepted) - 1),
    ttft_s=0.5,
    tpot_s=0.1,
    tokens_per_s=10.0,
  )


def test_means_shares_and_histogram():
  found = acceptance.summarize(
    [completion(6, [1, 0, 1, 1]), completion(13, [2, 4, 2, 0])]
  )
  assert found.requests == 2
  assert found.rounds == 11
  assert found.tau_per_request == pytest.approx((6 / 3 + 13 / 8) / 2)
  assert found.tau_per_round == pytest.approx(19 / 11)
  assert found.histogram == [3, 4, 3, 1]
  assert found.acceptance_per_position == pytest.approx(
    [8 / 11, 4 / 11, 1 / 11]
  )
  assert found.conditional_acceptance == pytest.approx([8 / 11, 4 / 8, 1 / 4])


def test_reply_of_one_token_has_no_tau():
  found = acceptance.summarize(
    [completion(0, [0, 0, 0]), completion(4, [1, 0, 1])]
  )
  assert found.requests == 2
  assert found.tau_per_request == 2


def test_nothing_accepted_divides_by_nothing():
  found = acceptance.summarize([completion(2, [2, 0, 0])])
  assert found.acceptance_per_position == [0, 0]
  assert found.conditional_acceptance == [0, 0]
  nothing = acceptance.summarize([completion(0, [0, 0, 0])])
  assert nothing.tau_per_request == nothing.tau_per_round == 0


def test_decoded_prompts_have_the_planted_acceptance():
  model = tiny_model()
  text = "Hello"
  plain = generate(model.without_drafter(), text, max_new_tokens=29)
  ids = model.tokenizer.encode_chat([{"role": "user", "content": text}])
  oracle = oracle_model(model, [ids], [plain.tokens], [[1, 4]])
  settings = EvalConfig(limit=1, max_new_tokens=10, batch_size=3)
  found = acceptance.evaluate(
    oracle, [Prompt((text,)), Prompt(("x",))], settings
  )
  # Rounds emit token 1; 2, 3 and 4; 5 to 9.
  assert found.requests == 1
  assert found.histogram == [1, 0, 1, 0, 1]
  assert found.tau_per_round == 3


def test_acceptance_by_label_is_that_of_its_replies():
  replies = [
    completion(6, [1, 2]),
    completion(9, [3, 0]),
    completion(4, [0, 1]),
  ]
  found = acceptance.summarize_by(["a", "b", "a"], replies)
  assert list(found) == ["a", "b"]
  assert found["a"]["requests"] == 2
  assert found["a"]["histogram"] == [1, 3]
  assert found["b"]["tau_per_round"] == pytest.approx(3)
  with pytest.raises(ValueError):
    acceptance.summarize_by(["a"], replies)
