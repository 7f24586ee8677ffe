"""Prompts in, text out: order, grouping, turns, compilations, errors."""

import numpy as np
import pytest

import dflash_jax
from dflash_jax.chat import Chat
from dflash_jax.compare import compare
from dflash_jax.config import ConfigError
from dflash_jax.decode import Decoder
from dflash_jax.generate import generate, plan_batches, warm_up
from dflash_jax.prompts import Prompt
from tests.testing import oracle_model, tiny_model

# The third and fourth are long: a bucket of their own.
TEXTS = ["?", "Hello", "What is it? " * 2, "Tell me more, please.", "Hi"]


@pytest.fixture(scope="module")
def model():
  """A random model with a byte tokenizer and an untrained drafter."""
  return tiny_model()


def encode(model, text):
  return model.tokenizer.encode_chat([{"role": "user", "content": text}])


def test_one_text_gives_one_completion(model):
  found = generate(model, "Hello", max_new_tokens=9)
  assert found.tokens == generate(model, ["Hello"], max_new_tokens=9)[0].tokens
  assert found.text == model.tokenizer.decode(found.tokens)
  assert len(found.tokens) == 9
  assert found.prompt_tokens == len(encode(model, "Hello"))


@pytest.mark.parametrize("batch_size", [2, 7])
def test_results_come_in_the_order_of_prompts(model, batch_size):
  alone = [generate(model, text, max_new_tokens=7).tokens for text in TEXTS]
  assert len({tuple(tokens) for tokens in alone}) == len(TEXTS)
  found = generate(model, TEXTS, max_new_tokens=7, batch_size=batch_size)
  assert [c.tokens for c in found] == alone


def test_speculative_tokens_equal_plain_tokens(model):
  plain = generate(model.without_drafter(), TEXTS[:2], max_new_tokens=29)
  found = generate(model, TEXTS[:2], max_new_tokens=29, batch_size=2)
  assert [c.tokens for c in found] == [c.tokens for c in plain]


def test_similar_lengths_are_decoded_together(model):
  batches = plan_batches(model, TEXTS, max_new_tokens=7, batch_size=2)
  assert [batch.places for batch in batches] == [[0, 4], [1, 3], [2]]
  assert [batch.pieces for batch in batches] == [(32,), (64,), (64,)]
  assert {batch.rows for batch in batches} == {2}


def test_turns_are_answered_in_order(model):
  prompts = [Prompt(("a", "b")), "d", Prompt(("e", "f"))]
  together = generate(model, prompts, max_new_tokens=7, batch_size=3)
  alone = [
    generate(model, Prompt(("a", "b")), max_new_tokens=7),
    [generate(model, "d", max_new_tokens=7)],
    generate(model, Prompt(("e", "f")), max_new_tokens=7),
  ]
  expected = [c.tokens for completions in alone for c in completions]
  assert [c.tokens for c in together] == expected


def test_streamed_tokens_go_to_their_place(model):
  streamed = {}

  def on_tokens(place, ids, slots):
    assert len(ids) == len(slots)
    streamed.setdefault(place, []).extend(ids)

  prompts = ["d", Prompt(("a", "b")), Prompt(("e", "f"))]
  found = generate(
    model, prompts, max_new_tokens=7, batch_size=3, on_tokens=on_tokens
  )
  assert streamed == {i: c.tokens for i, c in enumerate(found)}


def test_prompts_of_one_bucket_compile_once():
  model = tiny_model(seed=3, rounds_per_dispatch=5)
  before = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
  for text in ("a", "bc", "a longer one", "thirty-two tokens"[:12]):
    generate(model, text, max_new_tokens=6)
  after = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
  assert np.subtract(after, before).tolist() == [1, 1]


def test_warm_up_leaves_nothing_to_compile():
  model = tiny_model(seed=4, rounds_per_dispatch=6)
  prompts = [*TEXTS[1:], Prompt(("one", "two"))]
  batches = plan_batches(model, prompts, max_new_tokens=5, batch_size=4)
  warm_up(model, batches)
  before = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
  generate(model, prompts, max_new_tokens=5, batch_size=4)
  after = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
  assert after == before


def test_comparison_of_a_perfect_drafter(model):
  prompts = [encode(model, text) for text in ("Hello", "Hello!")]
  plain = generate(
    model.without_drafter(), ["Hello", "Hello!"], max_new_tokens=29
  )
  oracle = oracle_model(model, prompts, [c.tokens for c in plain], [[], []])
  batches = plan_batches(
    model, ["Hello", "Hello!"], max_new_tokens=11, batch_size=2
  )
  found = dict(compare(oracle, batches, repeats=3))
  assert [found[place].is_identical for place in (0, 1)] == [True, True]
  assert found[0].speculative.tau == 5
  assert found[0].plain.tau == 1
  assert found[0].speedup == pytest.approx(
    found[0].plain.tpot_s / found[0].speculative.tpot_s
  )


def test_comparison_needs_a_drafter(model):
  plain = model.without_drafter()
  with pytest.raises(ConfigError, match="no drafter to compare"):
    next(compare(plain, plan_batches(plain, ["a"])))


@pytest.mark.parametrize(
  ("arguments", "complaint"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens=0 is impossible"),
    ({"batch_size": 0}, "batch_size=0 is impossible"),
    ({"max_new_tokens": 600}, "budget of 600 exceed the capacity of 509"),
  ],
)
def test_impossible_settings_are_named(model, arguments, complaint):
  with pytest.raises(ConfigError, match=complaint):
    generate(model, "a", **arguments)


def test_long_prompt_is_refused_before_anything_is_decoded(model):
  calls = []
  with pytest.raises(ConfigError, match="exceed the capacity of 509; shorten"):
    generate(model, ["a", "b" * 500], on_tokens=lambda *a: calls.append(a))
  assert not calls


def test_long_conversation_is_refused(model):
  turns = Prompt(("a" * 60,) * 5)
  plan_batches(model, [turns], max_new_tokens=2)
  with pytest.raises(ConfigError, match="exceed the capacity of 509"):
    generate(model, turns, max_new_tokens=60)


def test_prompt_that_just_fits_is_answered():
  text = "b" * 40
  tokens = len(encode(tiny_model(), text))
  found = generate(tiny_model(max_length=tokens + 7), text, max_new_tokens=7)
  assert len(found.tokens) == 7
  with pytest.raises(ConfigError, match=f"capacity of {tokens + 6}"):
    generate(tiny_model(max_length=tokens + 6), text, max_new_tokens=7)


def test_model_without_tokenizer_says_so():
  with pytest.raises(ConfigError, match="no tokenizer"):
    generate(tiny_model(31), "a")


def test_no_prompts_give_no_completions(model):
  assert generate(model, []) == []


def test_package_loads_and_generates_in_three_lines(tmp_path):
  model = dflash_jax.load("configs/tiny.py")
  found = dflash_jax.generate(model, "Hello!", max_new_tokens=3)
  assert len(found.tokens) == 3
  assert dflash_jax.load(model.config).config == model.config
  with pytest.raises(ConfigError, match=r"missing\.py does not exist"):
    dflash_jax.load(tmp_path / "missing.py")


def test_conversation_lengths_bound_what_is_read(model):
  chat = Chat(model.tokenizer, model.stop_ids)
  turns = ("e", "f")
  bound = chat.lengths(turns)
  found = generate(model, Prompt(turns), max_new_tokens=7)
  assert [c.prompt_tokens for c in found] == bound
