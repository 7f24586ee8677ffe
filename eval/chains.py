"""A chain: one workflow at one task, as far as its requests have come."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dflash_jax.tokenizer import Message, Tokenizer, TokenizerError
from eval.workflows import Call, Workflow

_REPLY = "dflash-reply-stands-here"


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Turns, and the token ids that the target has read and emitted for them.

  What is said later only appends: earlier ids, replies as they were emitted,
  stay an exact prefix, so that kept pages of them are found. Conversations are
  values: two that go on from the same one are a fork.

  Attributes:
    tokenizer: of the target.
    stop_ids: tokens that end a reply.
    messages: turns so far, as chat templates take them.
    tokens: of them, up to where the next one begins; none before the first
      question.
  """

  tokenizer: Tokenizer
  stop_ids: tuple[int, ...]
  messages: tuple[Message, ...] = ()
  tokens: tuple[int, ...] = ()

  def ask(self, text: str, role: str = "user") -> "Conversation":
    """The conversation after a text, up to where the assistant answers.

    Raises:
      TokenizerError: the chat template refuses the role, or cannot go on from
        an earlier reply.
    """
    message = {"role": role, "content": text}
    messages = (*self.messages, message)
    if not self.tokens:
      tokens = tuple(self.tokenizer.encode_chat([*messages]))
      return dataclasses.replace(self, messages=messages, tokens=tokens)
    earlier = {"role": "assistant", "content": _REPLY}
    shown = [*self.messages[:-1], earlier, message]
    _, found, between = self.tokenizer.render(shown).rpartition(_REPLY)
    if not found:
      raise TokenizerError(
        f"the chat template of {self.tokenizer.name} drops earlier replies, so "
        "a conversation cannot continue; take another target"
      )
    # The template writes the end of the turn itself, so a stop token goes.
    ended = self.tokens[-1] in self.stop_ids
    kept = self.tokens[:-1] if ended else self.tokens
    tokens = (*kept, *self.tokenizer.encode(between))
    return dataclasses.replace(self, messages=messages, tokens=tokens)

  def answer(self, text: str, tokens: Sequence[int]) -> "Conversation":
    """The conversation after a reply, stop token included."""
    message = {"role": "assistant", "content": text}
    return dataclasses.replace(
      self,
      messages=(*self.messages, message),
      tokens=(*self.tokens, *tokens),
    )


@dataclasses.dataclass(frozen=True)
class Question:
  """A request of a chain, ready to be sent.

  Attributes:
    call: of the workflow. copy: which of its copies, from 0.
    conversation: up to where the target answers.
    max_new_tokens: longest reply.
    seed: of its noise; copies have their own.
  """

  call: Call
  copy: int
  conversation: Conversation
  max_new_tokens: int
  seed: int


class Chain:
  """Knows which requests may be sent, and what they say.

  Attributes:
    workflow: what is done.
    task: what about.
  """

  def __init__(
    self,
    workflow: Workflow,
    task: str,
    opening: Conversation,
    *,
    max_new_tokens: int,
    seed: Sequence[int],
  ):
    """A chain of which nothing has been sent.

    Args:
      workflow, task: as above.
      opening: what every conversation begins with: a system prompt, or nothing.
      max_new_tokens: of calls that do not say.
      seed: words that tell the chain's noise from other chains'.
    """
    self.workflow, self.task = workflow, task
    self._opening = opening
    self._max_new_tokens = max_new_tokens
    self._seed = [*seed]
    self._sent: set[str] = set()
    # Of each call, what its copies' conversations have become; None of those
    # that have not answered.
    self._ends: dict[str, list[Conversation | None]] = {
      call.name: [None] * call.copies for call in workflow.calls
    }

  @property
  def is_done(self) -> bool:
    """Whether every request has been answered."""
    return all(self._is_answered(name) for name in self._ends)

  def next_questions(self) -> list[Question]:
    """Those that may be sent now; each is given once."""
    questions = []
    for place, call in enumerate(self.workflow.calls):
      if call.name in self._sent or not all(map(self._is_answered, call.needs)):
        continue
      self._sent.add(call.name)
      for copy in range(call.copies):
        questions.append(self._question(place, call, copy))
    return questions

  def take(self, question: Question, text: str, tokens: Sequence[int]) -> None:
    """Takes in a reply."""
    end = question.conversation.answer(text, tokens)
    self._ends[question.call.name][question.copy] = end

  def _is_answered(self, name: str) -> bool:
    return None not in self._ends[name]

  def _question(self, place: int, call: Call, copy: int) -> Question:
    replies = {name: self._replies(name) for name in call.needs}
    start = self._opening
    if call.continues:
      ends = self._ends[call.continues]
      end = ends[copy if len(ends) > 1 else 0]
      assert end is not None
      start = end
    words = np.random.SeedSequence([*self._seed, place, copy])
    text = call.say(copy, self.task, replies)
    return Question(
      call=call,
      copy=copy,
      conversation=start.ask(text, call.role),
      max_new_tokens=call.tokens or self._max_new_tokens,
      seed=int(words.generate_state(1)[0]),
    )

  def _replies(self, name: str) -> list[str]:
    """What a call's copies said last."""
    return [end.messages[-1]["content"] for end in self._ends[name] if end]
