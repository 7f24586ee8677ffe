"""Text in and out: token ids, chat templates, streamed text."""

import copy
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dflash_jax import weights
from dflash_jax.weights import huggingface
from dflash_jax.weights.gguf_tokenizer import read_gguf_tokenizer

Message = dict[str, Any]

# Stands for a turn's content while a template is taken apart.
_SENTINEL = "dflash-sentinel-content"
# The variable by which chat templates are told to think, or not to.
_THINKING = "enable_thinking"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenizerError(ValueError):
  """A chat that this tokenizer cannot render; names the remedy."""


class Tokenizer:
  """A target's tokenizer and chat template.

  Attributes:
    name: where it came from, for messages.
    eos_ids: tokens that end a reply, the end of a turn included.
    thinking: whether chats ask the model to think first; None leaves it to the
      chat template. See `with_thinking`.
    vocab_size: ids it can decode; the embedding may have more rows.
  """

  def __init__(
    self,
    backend: PreTrainedTokenizerBase,
    *,
    name: str,
    eos_ids: Iterable[int] = (),
  ):
    self.name = name
    self.thinking: bool | None = None
    self._backend = backend
    own = [] if backend.eos_token_id is None else [backend.eos_token_id]
    ids = dict.fromkeys([*own, *eos_ids, *self._end_of_turn()])
    self.eos_ids: tuple[int, ...] = tuple(ids)
    self.vocab_size = len(backend)

  def encode(self, text: str, add_special: bool = False) -> list[int]:
    """Token ids of `text`; with `add_special`, as the model starts one."""
    return self._backend.encode(
      text, add_special_tokens=add_special, verbose=False
    )

  def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
    """Text of token ids; bytes that are no UTF-8 come out as U+FFFD."""
    text = self._backend.decode(
      [int(i) for i in ids],
      skip_special_tokens=skip_special,
      clean_up_tokenization_spaces=False,
    )
    return cast(str, text)

  def render(
    self, messages: list[Message], add_generation_prompt: bool = True
  ) -> str:
    """The conversation as the model's own chat template writes it.

    Args:
      messages: turns, each {"role": ..., "content": ...}.
      add_generation_prompt: end with the start of the assistant's turn.

    Raises:
      TokenizerError: there is no template, or it refuses these messages.
    """
    if self._backend.chat_template is None:
      raise TokenizerError(
        f"{self.name} has no chat template, as base models have none; encode "
        "plain text instead, or use an instruction-tuned target"
      )
    try:
      text = self._backend.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **self._switches(),
      )
    except jinja2.TemplateError as error:
      raise TokenizerError(
        f"the chat template of {self.name} refuses these messages: {error}; "
        "check their roles and order"
      ) from error
    return cast(str, text)

  def encode_chat(self, messages: list[Message]) -> list[int]:
    """Token ids of a conversation, up to where the assistant answers."""
    return self.encode(self.render(messages))

  def with_thinking(self, thinking: bool) -> "Tokenizer":
    """The same, with chats in the template's thinking mode, or out of it.

    Raises:
      TokenizerError: the template has no such mode to switch.
    """
    if _THINKING not in str(self._backend.chat_template):
      raise TokenizerError(
        f"the chat template of {self.name} has no switch for thinking "
        f"({_THINKING}); leave --thinking and target.thinking out"
      )
    other = copy.copy(self)
    other.thinking = thinking
    return other

  def _switches(self) -> dict[str, Any]:
    return {} if self.thinking is None else {_THINKING: self.thinking}

  def user_turn_prefix(self) -> str:
    """The rendered chat up to where the user's first words would stand."""
    message = {"role": "user", "content": _SENTINEL}
    rendered = self.render([message], add_generation_prompt=False)
    before, sentinel, _ = rendered.partition(_SENTINEL)
    if not sentinel:
      raise TokenizerError(
        f"the chat template of {self.name} does not show the user's words, "
        "so the target cannot write prompts itself; give prompts in a file"
      )
    return before

  def _end_of_turn(self) -> list[int]:
    """The special token that follows an assistant's words, if any."""
    if self._backend.chat_template is None:
      return []
    messages = [
      {"role": "user", "content": "."},
      {"role": "assistant", "content": _SENTINEL},
    ]
    try:
      rendered = self.render(messages, add_generation_prompt=False)
    except TokenizerError:
      return []
    after = rendered.partition(_SENTINEL)[2].lstrip()
    added = self._backend.added_tokens_decoder
    starts = {
      len(token.content): i
      for i, token in added.items()
      if token.special and after.startswith(token.content)
    }
    return [starts[max(starts)]] if starts else []


class StreamDecoder:
  """Turns token ids into text as they come, whole characters at a time.

  What `push` returns, joined, and `flush` at the end, is exactly
  `tokenizer.decode` of all ids. A character whose bytes are still incomplete
  is held back.
  """

  def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
    self._tokenizer = tokenizer
    self._skip_special = skip_special
    self._ids: list[int] = []
    # ids[:_start] are out and forgotten; ids[_start:_read] are out and kept,
    # because some tokenizers decode a token differently at a text's start.
    self._start = 0
    self._read = 0

  def _decode(self, start: int, stop: int | None = None) -> str:
    return self._tokenizer.decode(self._ids[start:stop], self._skip_special)

  def _pending(self) -> str:
    shown = len(self._decode(self._start, self._read))
    return self._decode(self._start)[shown:]

  def push(self, ids: Iterable[int]) -> str:
    """Takes more ids; returns the text that they complete."""
    self._ids.extend(int(i) for i in ids)
    text = self._pending()
    if not text or text.endswith(_REPLACEMENT):
      return ""
    self._start, self._read = self._read, len(self._ids)
    return text

  def flush(self) -> str:
    """The text still held back; the reply is over."""
    text = self._pending()
    self._start = self._read = len(self._ids)
    return text


def _read_directory(directory: pathlib.Path) -> Tokenizer:
  """The tokenizer of a directory in Hugging Face layout."""
  path = directory / "tokenizer.json"
  remedy = "fetch the model's tokenizer files into it again"
  try:
    with path.open(encoding="utf-8") as file:
      json.load(file)
  except FileNotFoundError:
    pass  # Older checkpoints carry vocab.json and merges.txt instead.
  except (OSError, ValueError) as error:
    raise weights.WeightsError(
      f"{path}: not readable as JSON: {error}; {remedy}"
    ) from error
  try:
    backend = AutoTokenizer.from_pretrained(
      str(directory), local_files_only=True, trust_remote_code=False
    )
  except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
    raise weights.WeightsError(
      f"{directory}: no usable tokenizer: {error}; {remedy}"
    ) from error
  has_config = (directory / "config.json").exists()
  eos_ids = huggingface.read_eos_ids(directory) if has_config else ()
  return Tokenizer(backend, name=str(directory), eos_ids=eos_ids)


def load_tokenizer(source: str) -> Tokenizer:
  """The tokenizer of a target.

  Args:
    source: as in `weights.load_target`.

  Raises:
    weights.WeightsError: no tokenizer there, or one that is not supported.
  """
  if source.startswith(weights.PACKAGE_PREFIX):
    package = source.removeprefix(weights.PACKAGE_PREFIX)
    path = weights.find_packaged_gguf(package)
    return Tokenizer(read_gguf_tokenizer(path), name=source)
  if pathlib.Path(source).suffix == ".gguf":
    return Tokenizer(read_gguf_tokenizer(source), name=source)
  return _read_directory(weights.find_directory(source))
