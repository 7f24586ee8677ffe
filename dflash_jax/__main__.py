"""Text in, text out.

    python -m dflash_jax --prompt "Why is the sky blue?"

Prints replies as they are decoded, then how they came about. Programs that
only want text and numbers add --json; `--help` lists everything.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

from absl import flags

from dflash_jax import command, decode_flags, display
from dflash_jax.chat import Chat
from dflash_jax.compare import Comparison, compare
from dflash_jax.config import Config, ConfigError
from dflash_jax.generate import (
  Batch,
  answer,
  plan_batches,
  seed_of,
  warm_up,
)
from dflash_jax.model import Model, load
from dflash_jax.prompts import Prompt, read_prompts
from dflash_jax.session import MIN_CHUNK, Completion, OnTokens, Session


@dataclasses.dataclass(frozen=True)
class Options:
  """How replies are shown.

  Attributes:
    compare: decode plainly too, and say how they compare.
    json: one JSON object per reply, and nothing else.
    show_blocks: mark drafted tokens.
    stream: show text while it is decoded.
  """

  compare: bool = False
  json: bool = False
  show_blocks: bool = False
  stream: bool = True


def define_flags() -> None:
  """The flags of python -m dflash_jax, besides --config."""
  flags.DEFINE_string("prompt", None, "What to ask.")
  flags.DEFINE_string(
    "prompts",
    None,
    "A file of JSON lines with 'prompt', 'question' or 'turns'.",
  )
  flags.DEFINE_integer("limit", 0, "Prompts of the file to use; 0 for all.")
  flags.DEFINE_bool(
    "chat",
    False,
    "Talk: reads a line, answers, and again. /reset starts anew, /quit ends.",
  )
  flags.DEFINE_string(
    "drafter",
    None,
    "Directory of a drafter (DFlash, EAGLE-3 or a small model), 'ngram' for "
    "look-up, or 'none' for plain decoding. Default: config.drafter.path.",
  )
  flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "Longest reply. Default: config.decode.max_new_tokens.",
  )
  flags.DEFINE_integer(
    "batch_size",
    None,
    "Prompts decoded together. Default: config.decode.batch_size.",
  )
  flags.DEFINE_bool(
    "compare", False, "Decode plainly too: speed-up, and identical tokens?"
  )
  flags.DEFINE_bool(
    "json", False, "Print one JSON object per reply, and nothing else."
  )
  flags.DEFINE_bool(
    "show_blocks",
    False,
    "Colour each token by the block slot it was drafted in.",
  )
  flags.DEFINE_bool("stream", True, "Show text while it is decoded.")
  decode_flags.define_flags()


def main(config: Config) -> None:
  """Entry point of python -m dflash_jax."""
  values = flags.FLAGS
  sources = [bool(values.prompt), bool(values.prompts), values.chat]
  if sum(sources) != 1:
    raise ConfigError("give one of --prompt=TEXT, --prompts=FILE and --chat")
  prompts = [Prompt((values.prompt or "",))]
  if values.prompts:
    prompts = read_prompts(values.prompts, values.limit)
  options = Options(
    values.compare, values.json, values.show_blocks, values.stream
  )
  model = load(_override(config))
  if values.chat:
    talk(model, options, sys.stdin, sys.stdout)
  else:
    answer_all(model, prompts, options, sys.stdout)


def _override(config: Config) -> Config:
  """The config, with the flags that are short for fields of it."""
  values = flags.FLAGS
  given = {
    name: getattr(values, name)
    for name in ("max_new_tokens", "batch_size")
    if getattr(values, name) is not None
  }
  path = config.drafter.path if values.drafter is None else values.drafter
  drafter = dataclasses.replace(config.drafter, path=path)
  config = dataclasses.replace(config, drafter=drafter)
  return decode_flags.override(config, **given)


# --- Prompts ------------------------------------------------------------------


def answer_all(
  model: Model, prompts: Sequence[Prompt], options: Options, out: TextIO
) -> None:
  """Answers prompts and prints the replies in order."""
  batches = plan_batches(model, prompts)
  texts = [text for prompt in prompts for text in prompt.turns]
  replies = _Replies(model, texts, options, out)
  is_streamed = options.stream and not options.json and batches[0].rows == 1
  on_tokens = replies.stream if is_streamed else None
  if sys.stderr.isatty():
    print("compiling ...", file=sys.stderr)
  comparisons = []
  for place, reply in _decode(model, batches, options, on_tokens):
    if isinstance(reply, Comparison):
      comparisons.append(reply)
      replies.add(place, reply.speculative, reply)
    else:
      replies.add(place, reply, None)
  if len(comparisons) > 1 and not options.json:
    print("\n" + display.summary_of(comparisons), file=out)


def _decode(
  model: Model,
  batches: Sequence[Batch],
  options: Options,
  on_tokens: OnTokens | None,
) -> Iterator[tuple[int, Completion | Comparison]]:
  if options.compare:
    yield from compare(model, batches, on_tokens=on_tokens)
    return
  warm_up(model, batches)
  for batch in batches:
    yield from answer(model, batch, on_tokens=on_tokens)


class _Replies:
  """Prints replies in the order of their prompts, whenever they come."""

  def __init__(
    self, model: Model, texts: list[str], options: Options, out: TextIO
  ):
    self._model = model
    self._texts = texts
    self._options = options
    self._out = out
    self._waiting: dict[int, tuple[Completion, Comparison | None]] = {}
    self._next = 0
    self._printers: dict[int, display.Printer] = {}

  def stream(self, place: int, ids: list[int], slots: list[int]) -> None:
    """Shows new tokens; as `on_tokens` of a batch of one row."""
    if place not in self._printers:
      self._printers[place] = self._start(place)
    self._printers[place].write(ids, slots)

  def add(
    self, place: int, completion: Completion, comparison: Comparison | None
  ) -> None:
    """Takes a finished reply; prints it once those before it are out."""
    self._waiting[place] = completion, comparison
    while self._next in self._waiting:
      self._finish(self._next, *self._waiting.pop(self._next))
      self._next += 1

  def _start(self, place: int) -> display.Printer:
    printer = new_printer(self._model, self._options, self._out)
    if place == 0 and self._options.show_blocks:
      print(printer.legend(), file=self._out)
    print(f"\n> {self._texts[place]}\n", file=self._out)
    return printer

  def _finish(
    self, place: int, completion: Completion, comparison: Comparison | None
  ) -> None:
    if self._options.json:
      print(display.json_line(completion, comparison), file=self._out)
      self._out.flush()
      return
    if place not in self._printers:
      self.stream(place, completion.tokens, completion.slots)
    self._printers.pop(place).end()
    print("\n" + display.statistics_of(completion), file=self._out)
    if comparison is not None:
      print(display.comparison_of(comparison), file=self._out)
    self._out.flush()


def new_printer(model: Model, options: Options, out: TextIO) -> display.Printer:
  """A printer for one reply of `model`."""
  if model.tokenizer is None:
    raise ConfigError("this model has no tokenizer, so it cannot show text")
  return display.Printer(
    model.tokenizer,
    out,
    show_blocks=options.show_blocks,
    max_drafts=model.decoder().depth,
  )


# --- Conversation -------------------------------------------------------------


def talk(model: Model, options: Options, lines: TextIO, out: TextIO) -> None:
  """Answers line after line, keeping both KV caches between turns."""
  if options.compare:
    raise ConfigError("--compare needs --prompt or --prompts, not --chat")
  if model.tokenizer is None:
    raise ConfigError("this model has no tokenizer, so it cannot chat")
  decode = model.config.decode
  session = Session(
    model=model,
    decoder=model.decoder(),
    batch=1,
    capacity=decode.max_length,
    max_new_tokens=decode.max_new_tokens,
  )
  _compile(session)
  chat = Chat(model.tokenizer, model.stop_ids)
  prompt = "> " if lines.isatty() else ""
  while True:
    print(prompt, end="", file=out, flush=True)
    line = lines.readline()
    text = line.strip()
    if not line or text == "/quit":
      return
    if text == "/reset":
      session.reset()
      chat = Chat(model.tokenizer, model.stop_ids)
    elif text:
      _say(session, chat, text, options, out)


def _compile(session: Session) -> None:
  """Keeps compilation out of the first turn's times."""
  tokens = [0] * min(2 * MIN_CHUNK, session.capacity // 2)  # a short question
  session.reply([tokens], [min(2, session.max_new_tokens)])
  session.reset()


def _say(
  session: Session, chat: Chat, text: str, options: Options, out: TextIO
) -> None:
  """Answers one line, or says why the conversation is over."""
  ids = chat.next_prompt(text)
  used = int(session.lengths[0]) + len(ids)
  budget = min(session.max_new_tokens, session.capacity - used)
  if budget < 1:
    print(
      f"error: the conversation has {used} tokens and the capacity is "
      f"{session.capacity}; /reset starts anew, a higher decode.max_length "
      "makes room",
      file=sys.stderr,
    )
    return
  printer = new_printer(session.model, options, out)
  is_streamed = options.stream and not options.json

  def on_tokens(_: int, new: list[int], slots: list[int]) -> None:
    printer.write(new, slots)

  (completion,) = session.reply(
    [ids],
    [budget],
    seeds=[seed_of(session.model, 0)],
    on_tokens=on_tokens if is_streamed else None,
  )
  chat.add_turn(text, completion.text, completion.tokens)
  if options.json:
    print(display.json_line(completion), file=out, flush=True)
    return
  if not is_streamed:
    printer.write(completion.tokens, completion.slots)
  printer.end()
  print(
    f"({len(completion.tokens)} tokens, tau {completion.tau:.2f}, "
    f"{completion.tokens_per_s:.1f} tokens/s)\n",
    file=out,
    flush=True,
  )


if __name__ == "__main__":
  command.run(main, define_flags)
