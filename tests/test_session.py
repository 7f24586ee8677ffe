"""Sessions: the same tokens as plain decoding, and honest statistics."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.config import ConfigError
from dflash_jax.decode import Decoder
from dflash_jax.session import Session, acceptance_per_position, bucket
from dflash_jax.target import Target
from tests.testing import BLOCK_SIZE, oracle_model, tiny_model

VOCAB = 31
DRAFTS = BLOCK_SIZE - 1
LONGEST = 71
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [4]]


def reply(model, prompts, budgets, *, on_tokens=None, batch=None):
  """Completions of one fresh session."""
  session = Session(
    model=model,
    decoder=model.decoder(),
    batch=batch or len(prompts),
    capacity=LONGEST,
    max_new_tokens=31,
  )
  return session.reply(prompts, budgets, on_tokens=on_tokens)


@functools.partial(jax.jit, static_argnums=0)
def read_all(target, params, tokens):
  """Logits f32[T, V] after each of tokens i32[T], from one pass."""
  cache = target.init_cache(1, len(tokens))
  hidden, _, _ = target.forward(params, tokens[None], cache)
  return target.logits(params, hidden[0])


def reread(model, prompt, count):
  """Greedy decoding that reads everything again for each token."""
  tokens = np.zeros((LONGEST,), np.int32)  # one shape; what follows is unseen
  tokens[: len(prompt)] = prompt
  for last in range(len(prompt) - 1, len(prompt) - 1 + count):
    logits = read_all(model.target, model.params.target, jnp.array(tokens))
    tokens[last + 1] = logits[last].argmax()
  return tokens[len(prompt) :][:count].tolist()


def with_stop(model, *ids):
  """The model, with other stop tokens."""
  target = dataclasses.replace(model.target.config, eos_ids=ids)
  return dataclasses.replace(model, target=Target(target))


def test_plain_decoding_equals_reading_everything_again():
  model = tiny_model(VOCAB, drafter=False)
  (found,) = reply(model, PROMPTS[:1], [13])
  assert found.tokens == reread(model, PROMPTS[0], 13)
  assert len(set(found.tokens)) > 3  # else identity would prove little


@pytest.mark.parametrize("width", range(1, DRAFTS + 1))
def test_every_verify_width_gives_the_plain_tokens(width):
  model = tiny_model(VOCAB, width=f"fixed:{width}")
  budgets = [23, 19, 1, 17]
  plain = reply(model.without_drafter(), PROMPTS, budgets)
  found = reply(model, PROMPTS, budgets)
  assert [c.tokens for c in found] == [c.tokens for c in plain]
  assert [len(c.tokens) for c in found] == budgets
  assert {len(c.accepted) for c in found} == {width + 1}


@pytest.mark.parametrize(
  "budget", [1, 2, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE]
)
def test_budget_is_exact_when_every_draft_is_right(budget):
  model = tiny_model(VOCAB)
  (plain,) = reply(model.without_drafter(), PROMPTS[:1], [31])
  oracle = oracle_model(model, PROMPTS[:1], [plain.tokens], [[]])
  (found,) = reply(oracle, PROMPTS[:1], [budget])
  assert found.tokens == plain.tokens[:budget]
  rounds = -(-(budget - 1) // BLOCK_SIZE)
  assert found.rounds == rounds
  assert found.accepted == [0] * DRAFTS + [rounds]
  assert found.tau == ((budget - 1) / rounds if rounds else 0)


def test_statistics_of_planted_errors():
  """Drafts 1 and 2 right, 3 wrong; a full block; a block the budget cuts."""
  model = tiny_model(VOCAB)
  (plain,) = reply(model.without_drafter(), PROMPTS[:1], [31])
  oracle = oracle_model(model, PROMPTS[:1], [plain.tokens], [[3]])
  (found,) = reply(oracle, PROMPTS[:1], [11])
  assert found.tokens == plain.tokens[:11]
  assert found.slots == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]
  assert found.rounds == 3
  assert found.accepted == [0, 0, 1, 0, 2]
  assert found.tau == pytest.approx(10 / 3)
  assert found.prompt_tokens == len(PROMPTS[0])
  shares = acceptance_per_position(found.accepted)
  assert shares == pytest.approx([1, 1, 2 / 3, 2 / 3])


def test_times_agree_with_each_other():
  (found,) = reply(tiny_model(VOCAB), PROMPTS[:1], [11])
  assert found.ttft_s > 0
  assert found.tokens_per_s == pytest.approx(1 / found.tpot_s)


def test_rows_keep_their_own_pace():
  """Each row has its own length, errors, budget and end."""
  model = tiny_model(VOCAB)
  plain = reply(model.without_drafter(), PROMPTS, [31] * 4)
  oracle = oracle_model(
    model, PROMPTS, [c.tokens for c in plain], [[], [1, 2, 3], [4], [2]]
  )
  budgets = [11, 4, 7, 1]
  found = reply(oracle, PROMPTS, budgets)
  for row, completion in enumerate(found):
    assert completion.tokens == plain[row].tokens[: budgets[row]]
  assert [c.rounds for c in found] == [2, 3, 2, 0]
  assert [c.accepted for c in found] == [
    [0, 0, 0, 0, 2],
    [3, 0, 0, 0, 0],
    [0, 0, 0, 1, 1],
    [0, 0, 0, 0, 0],
  ]


@pytest.mark.parametrize("place", [0, 1, 3, 5])
def test_stop_token_ends_a_reply_inside_a_block(place):
  model = tiny_model(VOCAB)
  (plain,) = reply(model.without_drafter(), PROMPTS[2:3], [31])
  stop = plain.tokens[place]
  end = plain.tokens.index(stop) + 1  # it may have come before `place`
  oracle = oracle_model(model, PROMPTS[2:3], [plain.tokens], [[]])
  (found,) = reply(with_stop(oracle, stop), PROMPTS[2:3], [29])
  assert found.tokens == plain.tokens[:end]
  (drafted,) = reply(with_stop(model, stop), PROMPTS[2:3], [29])
  assert drafted.tokens == plain.tokens[:end]


def test_unused_rows_change_nothing():
  model = tiny_model(VOCAB)
  (alone,) = reply(model, PROMPTS[:1], [9])
  (padded,) = reply(model, PROMPTS[:1], [9], batch=3)
  assert padded.tokens == alone.tokens
  assert padded.accepted == alone.accepted


def test_prompt_read_in_pieces_gives_the_same_reply():
  prompt = np.random.default_rng(0).integers(0, VOCAB, 53).tolist()
  whole = tiny_model(VOCAB, prefill_chunk=64)
  pieces = tiny_model(VOCAB, prefill_chunk=16)
  prompts = [prompt, prompt[:17], prompt[:16]]
  expected = [c.tokens for c in reply(whole, prompts, [9, 9, 9])]
  assert [c.tokens for c in reply(pieces, prompts, [9, 9, 9])] == expected
  assert expected[0] == reread(whole, prompt, 9)


def test_streamed_tokens_are_the_reply():
  model = tiny_model(VOCAB, rounds_per_dispatch=2)
  streamed = {0: ([], []), 1: ([], [])}
  calls = []

  def on_tokens(row, ids, slots):
    calls.append(row)
    streamed[row][0].extend(ids)
    streamed[row][1].extend(slots)

  found = reply(model, PROMPTS[:2], [13, 3], on_tokens=on_tokens)
  for row, completion in enumerate(found):
    assert streamed[row] == (completion.tokens, completion.slots)
  assert calls.count(0) > 3  # not all at once


def test_second_turn_equals_reading_everything_again():
  model = tiny_model(VOCAB)
  session = Session(model, model.decoder(), 2, LONGEST, 31)
  first = session.reply(PROMPTS[:2], [13, 5])
  later = [[7, 7], [2, 9, 2, 1, 6, 8, 8]]
  second = session.reply(
    [[session.pending(row), *later[row]] for row in range(2)], [11, 12]
  )
  for row in range(2):
    history = PROMPTS[row] + first[row].tokens + later[row]
    assert second[row].tokens == reread(model, history, len(second[row].tokens))
    assert second[row].prompt_tokens == len(later[row]) + 1


def test_row_without_a_turn_keeps_its_cache():
  model = tiny_model(VOCAB)
  session = Session(model, model.decoder(), 2, LONGEST, 31)
  first = session.reply(PROMPTS[:2], [7, 7])
  session.reply([[session.pending(0), 1], []], [9, 0])
  (_, third) = session.reply([[], [session.pending(1), 2]], [0, 9])
  history = [*PROMPTS[1], *first[1].tokens, 2]
  assert third.tokens == reread(model, history, 9)


def test_reset_forgets():
  model = tiny_model(VOCAB)
  session = Session(model, model.decoder(), 1, LONGEST, 31)
  (first,) = session.reply(PROMPTS[:1], [9])
  session.reset()
  (again,) = session.reply(PROMPTS[:1], [9])
  assert again.tokens == first.tokens


def test_what_drafts_were_worth_outlives_a_session():
  model = tiny_model(VOCAB, width="threshold:0.4")
  sessions = [Session(model, model.decoder(), 1, LONGEST, 31) for _ in "ab"]
  start = jax.device_get(sessions[0].state.width)
  sessions[0].reply(PROMPTS[:1], [9])
  learnt = jax.device_get(sessions[0].state.width)
  assert not np.array_equal(*map(jax.tree.leaves, (start, learnt)))
  sessions[1].reset()
  for session in (sessions[1], Session(model, model.decoder(), 1, LONGEST, 31)):
    np.testing.assert_equal(jax.device_get(session.state.width), learnt)
  assert not tiny_model(VOCAB).beliefs


def test_full_capacity_is_usable_and_no_more():
  model = tiny_model(VOCAB)
  session = Session(model, model.decoder(), 1, 20, 15)
  (found,) = session.reply(PROMPTS[:1], [15])
  assert found.tokens == reread(model, PROMPTS[0], 15)
  with pytest.raises(
    ConfigError, match="20 tokens of prompt .* capacity of 20"
  ):
    session.reply([[session.pending(0)]], [1])


def test_impossible_requests_are_named():
  model = tiny_model(VOCAB)
  session = Session(model, model.decoder(), 1, 20, 15)
  with pytest.raises(ConfigError, match="5 tokens of prompt .* budget of 16"):
    dataclasses.replace(session, max_new_tokens=16).reply(PROMPTS[:1], [16])
  with pytest.raises(ConfigError, match="max_new_tokens=16 exceeds .* 15"):
    session.reply(PROMPTS[:1], [16])
  with pytest.raises(ConfigError, match="prompt 0 is empty"):
    session.reply([[]], [3])


def test_prompts_of_one_bucket_compile_once():
  model = tiny_model(VOCAB, rounds_per_dispatch=3)
  before = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
  for length in (1, 2, 7, 16):
    session = Session(model, model.decoder(), 1, 16 + 6, 6)
    session.reply([list(range(length))], [6 - length % 3])
  after = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
  assert np.subtract(after, before).tolist() == [1, 1]


@pytest.mark.parametrize(
  ("length", "size"),
  [(1, 16), (16, 16), (17, 32), (100, 100), (101, 100), (999, 100)],
)
def test_bucket_is_a_power_of_two_up_to_the_chunk(length, size):
  assert bucket(length, 100) == size
