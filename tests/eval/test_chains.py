"""Chains: what may be sent when, and conversations that only grow."""

import pytest

from dflash_jax.byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from dflash_jax.tokenizer import TokenizerError
from eval import workflows
from eval.chains import Chain, Conversation

TOKENIZER = byte_tokenizer(VOCAB_SIZE)
STOPS = TOKENIZER.eos_ids
SYSTEM = ({"role": "system", "content": "Be brief."},)
OPENING = Conversation(TOKENIZER, STOPS, SYSTEM)


def chain_of(*lines, opening=OPENING, seed=(3, 5)):
  (workflow,) = workflows.parse(lines).values()
  return Chain(workflow, "T", opening, max_new_tokens=9, seed=seed)


def answer(chain, question, text):
  """A reply in words that ends in a stop token."""
  chain.take(question, text, [*TOKENIZER.encode(text), STOPS[0]])


def names(questions):
  return [(question.call.name, question.copy) for question in questions]


def texts(questions):
  return [q.conversation.messages[-1]["content"] for q in questions]


# --- The order of requests ----------------------------------------------------


def test_a_request_is_sent_once_all_it_waits_for_have_answered():
  chain = chain_of(
    "w/last after two,one: {one}|{two}",
    "w/two*2 after one: {copy} {one}",
    "w/one tokens=4: {task}",
  )
  (one,) = chain.next_questions()
  assert (one.call.name, one.max_new_tokens) == ("one", 4)
  assert chain.next_questions() == []  # once
  answer(chain, one, "yes")
  two = chain.next_questions()
  assert names(two) == [("two", 0), ("two", 1)]
  assert texts(two) == ["1 yes", "2 yes"]
  assert [question.max_new_tokens for question in two] == [9, 9]
  answer(chain, two[1], "b")
  assert chain.next_questions() == [] and not chain.is_done
  answer(chain, two[0], "a")
  (last,) = chain.next_questions()
  assert texts([last]) == ["yes|two 1: a\ntwo 2: b"]
  assert not chain.is_done
  answer(chain, last, "end")
  assert chain.is_done and chain.next_questions() == []


def test_seeds_tell_chains_calls_and_copies_apart_and_come_back():
  lines = ("w/a*3: x", "w/b: x")

  def seeds(seed):
    return [q.seed for q in chain_of(*lines, seed=seed).next_questions()]

  assert seeds((3, 5)) == seeds((3, 5))
  assert len({*seeds((3, 5)), *seeds((3, 6)), *seeds((4, 5))}) == 12
  assert all(0 <= seed < 2**32 for seed in seeds((3, 5)))


# --- Conversations ------------------------------------------------------------


def test_a_conversation_in_ids_is_that_in_words():
  """The oracle is the chat template, applied to the whole conversation."""
  chain = chain_of("w/a: one", "w/b continues a role=tool: two {copy}")
  (first,) = chain.next_questions()
  turns = [*SYSTEM, {"role": "user", "content": "one"}]
  assert [*first.conversation.tokens] == TOKENIZER.encode_chat(turns)
  answer(chain, first, "said")
  (second,) = chain.next_questions()
  turns += [
    {"role": "assistant", "content": "said"},
    {"role": "tool", "content": "two 1"},
  ]
  assert [*second.conversation.tokens] == TOKENIZER.encode_chat(turns)


def test_without_a_system_prompt_the_question_comes_first():
  empty = Conversation(TOKENIZER, STOPS)
  turns = [{"role": "user", "content": "one"}]
  assert [*empty.ask("one").tokens] == TOKENIZER.encode_chat(turns)


@pytest.mark.parametrize("stops", [True, False])
def test_what_was_read_and_emitted_stays_an_exact_prefix(stops):
  """Also ids that no text gives: half a character, cut by the budget."""
  half = TOKENIZER.encode("\N{SNOWMAN}")[:2]
  assert TOKENIZER.encode(TOKENIZER.decode(half)) != half  # as text: broken
  reply = [*half, STOPS[0]] if stops else half
  before = OPENING.ask("one")
  after = before.answer(TOKENIZER.decode(half), reply).ask("two")
  kept = (*before.tokens, *half)
  assert after.tokens[: len(kept)] == kept
  rest = TOKENIZER.decode(after.tokens[len(kept) :], skip_special=False)
  assert rest == "<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n" + (
    "<|im_start|>assistant\n"
  )


def test_copies_fork_one_conversation_and_then_go_on_each_with_its_own():
  chain = chain_of(
    "w/a: x", "w/b*2 continues a: {copy}", "w/c*2 continues b: {b}"
  )
  (a,) = chain.next_questions()
  answer(chain, a, "root")
  forks = chain.next_questions()
  common = len(a.conversation.tokens) + len("root")
  first, second = (question.conversation.tokens for question in forks)
  assert first[:common] == second[:common] and first != second
  for question, text in zip(forks, ("left", "right"), strict=True):
    answer(chain, question, text)
  ends = chain.next_questions()
  assert texts(ends) == ["b 2: right", "b 1: left"]
  for end, fork in zip(ends, forks, strict=True):
    held = fork.conversation.tokens
    assert end.conversation.tokens[: len(held)] == held
  said = [[m["content"] for m in end.conversation.messages[1:]] for end in ends]
  assert said == [
    ["x", "root", "1", "left", "b 2: right"],
    ["x", "root", "2", "right", "b 1: left"],
  ]


def test_a_template_that_drops_replies_is_refused(monkeypatch):
  asked = OPENING.ask("one").answer("said", [1])
  monkeypatch.setattr(TOKENIZER, "render", lambda messages: "nothing")
  with pytest.raises(TokenizerError, match="drops earlier replies"):
    asked.ask("two")
