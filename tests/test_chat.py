"""Conversations: the ids read turn after turn are the whole conversation's."""

import dataclasses
import io

import pytest

from dflash_jax.__main__ import Options, talk
from dflash_jax.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from dflash_jax.chat import Chat
from dflash_jax.config import ConfigError
from dflash_jax.generate import generate
from dflash_jax.prompts import Prompt
from dflash_jax.session import Session
from dflash_jax.target import Target
from dflash_jax.tokenizer import TokenizerError
from tests.testing import tiny_model

TURNS = ("Hello", "And then?", "Why?")


@pytest.fixture(scope="module")
def model():
  """A model whose replies are printable, so that they can be encoded again."""
  return tiny_model()


def whole_conversation(tokenizer, turns, replies):
  """encode_chat of everything up to the last question."""
  messages = []
  for turn, reply in zip(turns, [*replies, None], strict=False):
    messages.append({"role": "user", "content": turn})
    if reply is not None:
      messages.append({"role": "assistant", "content": reply})
  return tokenizer.encode_chat(messages[: 2 * len(turns) - 1])


@pytest.mark.parametrize("ends", [True, False])
def test_pieces_join_to_the_whole_conversation(ends):
  tokenizer = byte_tokenizer(VOCAB_SIZE)
  chat = Chat(tokenizer, tokenizer.eos_ids)
  replies = ["Good day.", "It went on."]
  history = []
  for turn, reply in zip(TURNS, [*replies, ""], strict=True):
    # A reply's last token is not in the caches: the next piece decides.
    history = history[:-1] if chat.messages else history
    history += chat.next_prompt(turn)
    if reply:
      tokens = tokenizer.encode(reply) + list(tokenizer.eos_ids) * ends
      history += tokens
      chat.add_turn(turn, reply, tokens)
  assert history == whole_conversation(tokenizer, TURNS, replies)


def test_asking_changes_nothing():
  tokenizer = byte_tokenizer(VOCAB_SIZE)
  chat = Chat(tokenizer, tokenizer.eos_ids)
  assert chat.next_prompt("a") == chat.next_prompt("a")
  chat.add_turn("a", "b", [5])
  assert chat.next_prompt("c") == chat.next_prompt("c")


def test_later_replies_equal_those_to_the_whole_conversation(model):
  found = generate(model, Prompt(TURNS), max_new_tokens=11)
  replies = []
  for completion in found:
    tokens = whole_conversation(
      model.tokenizer, TURNS[: len(replies) + 1], replies
    )
    session = Session(model, model.decoder(), 1, 256, 11)
    (again,) = session.reply([tokens], [11])
    assert completion.tokens == again.tokens
    replies.append(completion.text)
  assert len(set(replies)) == 3


def test_reply_that_ends_itself_continues_the_same(model):
  """With a stop token of its own, a reply leaves no token to read again."""
  first = generate(model, TURNS[0], max_new_tokens=11)
  stop = first.tokens[4]
  end = first.tokens.index(stop)
  target = dataclasses.replace(model.target.config, eos_ids=(stop,))
  stopping = dataclasses.replace(model, target=Target(target))
  one, two = generate(stopping, Prompt(TURNS[:2]), max_new_tokens=11)
  assert one.tokens == first.tokens[: end + 1]
  reply = model.tokenizer.decode(first.tokens[:end])
  tokens = whole_conversation(model.tokenizer, TURNS[:2], [reply])
  session = Session(stopping, stopping.decoder(), 1, 256, 11)
  (again,) = session.reply([tokens], [11])
  assert two.tokens == again.tokens


def test_template_that_drops_replies_is_refused():
  tokenizer = byte_tokenizer(VOCAB_SIZE)
  tokenizer._backend.chat_template = "{{ messages[-1].content }}"
  chat = Chat(tokenizer, tokenizer.eos_ids)
  chat.add_turn("a", "b", [5])
  with pytest.raises(TokenizerError, match="drops earlier replies"):
    chat.next_prompt("c")


def run(model, text, **options):
  """What a chat prints for these lines."""
  out = io.StringIO()
  talk(model, Options(**options), io.StringIO(text), out)
  return out.getvalue()


def replies_in(printed):
  """The lines that are neither blank nor statistics."""
  lines = printed.splitlines()
  return [line for line in lines if line and not line.endswith("tokens/s)")]


def test_chat_answers_piped_lines_like_generate():
  model = tiny_model(max_new_tokens=9)
  expected = [c.text for c in generate(model, Prompt(TURNS[:2]))]
  printed = run(model, f"{TURNS[0]}\n\n{TURNS[1]}")
  assert replies_in(printed) == expected
  assert replies_in(run(model, "\n".join(TURNS[:2]), stream=False)) == expected


def test_chat_resets_and_quits():
  model = tiny_model(max_new_tokens=9)
  printed = run(model, "Hello\nHello\n/reset\nHello\n/quit\nHello\n")
  first, second, third = replies_in(printed)
  assert first == third != second


def test_chat_says_when_the_conversation_is_full(capsys):
  model = tiny_model(max_new_tokens=9, max_length=51)
  printed = run(model, "Hello\nHello\n/reset\nHello\n")
  first, second = replies_in(printed)
  assert first == second
  errors = capsys.readouterr().err
  assert "error: the conversation has" in errors
  assert "capacity is 51; /reset" in errors


def test_chat_shortens_the_last_reply_to_fit():
  model = tiny_model(max_new_tokens=9)
  asked = len(Chat(model.tokenizer, ()).next_prompt("Hello"))
  tight = tiny_model(max_new_tokens=9, max_length=asked + 4)
  whole = generate(model, "Hello").text
  assert replies_in(run(tight, "Hello\n")) == [whole[:4]]


def test_chat_refuses_to_compare():
  with pytest.raises(ConfigError, match="--compare needs --prompt"):
    run(tiny_model(), "", compare=True)
