"""A conversation as the token ids that continue what the caches hold."""

import dataclasses

from dflash_jax.tokenizer import Message, Tokenizer, TokenizerError

_REPLY = "dflash-reply-stands-here"


@dataclasses.dataclass
class Chat:
  """One conversation, read piece by piece.

  Token ids sent and received, joined, are `encode_chat` of the conversation
  wherever decoding a reply and encoding it again gives the same ids and the
  template shows earlier replies unchanged. Elsewhere the conversation goes on
  from the ids the target emitted, which are what its cache holds.

  Attributes:
    tokenizer: of the target.
    stop_ids: tokens that end a reply.
    messages: turns so far, as chat templates take them.
  """

  tokenizer: Tokenizer
  stop_ids: tuple[int, ...]
  messages: list[Message] = dataclasses.field(default_factory=list)
  _anchor: int = -1  # last token of the last reply; not yet in the caches

  def next_prompt(self, text: str) -> list[int]:
    """Token ids to read before the reply to `text`; changes nothing."""
    user = {"role": "user", "content": text}
    if not self.messages:
      return self.tokenizer.encode_chat([user])
    earlier = {"role": "assistant", "content": _REPLY}
    rendered = self.tokenizer.render([*self.messages[:-1], earlier, user])
    _, found, between = rendered.rpartition(_REPLY)
    if not found:
      raise TokenizerError(
        f"the chat template of {self.tokenizer.name} drops earlier replies, so "
        "a conversation cannot continue; ask single questions"
      )
    # The template writes the end of the turn itself, so a stop token goes.
    kept = [] if self._anchor in self.stop_ids else [self._anchor]
    return kept + self.tokenizer.encode(between)

  def add_turn(self, text: str, reply: str, tokens: list[int]) -> None:
    """Records a turn: what was asked, and the reply with its token ids."""
    self.messages.append({"role": "user", "content": text})
    self.messages.append({"role": "assistant", "content": reply})
    self._anchor = tokens[-1]

  def lengths(self, turns: tuple[str, ...]) -> list[int]:
    """Tokens to read before the reply to each of these first turns.

    Counted as if no reply ended in a stop token, one too many if it does.
    """
    chat = Chat(self.tokenizer, self.stop_ids)
    counts = []
    for text in turns:
      counts.append(len(chat.next_prompt(text)))
      chat.add_turn(text, "", [-1])
    return counts
