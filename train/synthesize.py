r"""Writes a corpus in which the target answers prompts itself.

    python -m train.synthesize --config=configs/smollm2_135m_cpu.py \
        --config.synthesis.prompts='("questions.jsonl",)' \
        --config.synthesis.output=corpus

On-policy answers matter more than any other choice of training data: the same
prompts with answers from elsewhere cost more than half of the accepted length
(JetSpec, arXiv 2606.18394). Prompts come from files, of which only the first
turn is answered, and from the target, which continues its own chat template's
user turn. Everything drawn depends on (seed, prompt number) alone and is
written in order, so a killed run, started again with the same command, ends
with the same files.
"""

import dataclasses
import hashlib
import itertools
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tqdm
from absl import logging

from dflash_jax import command
from dflash_jax.config import Config, ConfigError, SynthesisConfig
from dflash_jax.model import Model, load
from dflash_jax.prompts import read_prompts
from dflash_jax.sampling import Sampling
from dflash_jax.session import Completion, Session, bucket
from dflash_jax.tokenizer import Tokenizer
from train.corpus import identify_target
from train.corpus_writer import CorpusWriter, Example, is_held_out
from train.files import FileError

LOOP_TOKENS = 64  # an unfinished answer whose end repeats this long is a loop
LOOP_PERIOD = 16


def synthesize(config: Config) -> None:
  """Writes the corpus of config.synthesis, or finishes a started one.

  Raises:
    ConfigError: settings that ask for nothing, or for two sources of one name.
    PromptError: a prompt file that cannot be used.
    FileError: a corpus of other settings, or a disk that refuses.
  """
  settings = config.synthesis
  _check_settings(settings)
  sources = {
    pathlib.Path(path).stem: [
      prompt.turns[0]
      for prompt in read_prompts(path, settings.num_file_prompts)
    ]
    for path in settings.prompts
  }
  writer = CorpusWriter(settings.output, _identity(config))
  if writer.index["complete"]:
    logging.info("%s is complete", settings.output)
    return
  model = load(
    dataclasses.replace(
      config,
      target=dataclasses.replace(config.target, dtype=settings.dtype),
      drafter=dataclasses.replace(config.drafter, path="none"),
    )
  )
  sources["self"] = write_prompts(model, writer)
  for name, prompts in sources.items():
    writer.add_held_out(
      name, [p for p in prompts if is_held_out(p, settings.held_out)]
    )
  merged = interleave(list(sources.values()))
  answer_prompts(model, writer, merged)
  offered = sum(map(len, sources.values()))
  writer.finish({"prompts": offered, "duplicates": offered - len(merged)})


def _check_settings(settings: SynthesisConfig) -> None:
  if not settings.output:
    raise ConfigError("synthesis.output is empty; name the corpus's directory")
  for name in ("batch_size", "shard_sequences", "max_answer_tokens"):
    if getattr(settings, name) < 1:
      raise ConfigError(
        f"synthesis.{name}={getattr(settings, name)} is impossible; use at "
        "least 1"
      )
  writes = settings.num_self_prompts > 0
  if not settings.prompts and not writes:
    raise ConfigError(
      "nothing to answer; set synthesis.prompts or synthesis.num_self_prompts"
    )
  if writes and not settings.openings:
    raise ConfigError(
      "synthesis.openings is empty; use ('',) to leave the target free"
    )
  names = ["self", *(pathlib.Path(path).stem for path in settings.prompts)]
  for name in names:
    if names.count(name) > 1:
      raise ConfigError(
        f"two prompt sources are named {name!r}, and so would be their "
        "held-out files; rename a file of synthesis.prompts"
      )


def _identity(config: Config) -> dict[str, Any]:
  """Everything the corpus depends on, wherever files lie."""
  settings = dataclasses.asdict(config.synthesis)
  del settings["output"]
  settings["prompts"] = [
    {
      "name": pathlib.Path(path).stem,
      "sha256": hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest(),
    }
    for path in config.synthesis.prompts
  ]
  return {**settings, "target": identify_target(config.target)}


def interleave(sources: Iterable[Sequence[str]]) -> list[str]:
  """Merges sources evenly, dropping repeats, so that any prefix is a mix."""
  ranked = [
    ((index + 0.5) / len(source), number, prompt)
    for number, source in enumerate(sources)
    for index, prompt in enumerate(source)
  ]
  merged: dict[str, str] = {}
  for _, _, prompt in sorted(ranked, key=lambda entry: entry[:2]):
    merged.setdefault(prompt.strip(), prompt)
  return list(merged.values())


# --- Prompts the target writes itself -----------------------------------------


def write_prompts(model: Model, writer: CorpusWriter) -> list[str]:
  """Samples user turns until num_self_prompts were drawn; returns the kept."""
  settings = model.config.synthesis
  openings = list(
    itertools.islice(
      itertools.cycle(settings.openings), settings.num_self_prompts
    )
  )
  size = settings.shard_sequences
  seen = set(writer.read_prompts())
  with Progress("prompts", len(openings)) as progress:
    for number, first in enumerate(range(0, len(openings), size)):
      part = openings[first : first + size]
      if number < len(writer.index["prompts"]):
        progress.skip(len(part))
        continue
      kept, counts = _write_part(model, part, first, seen, progress)
      writer.add_prompts(kept, counts)
  return writer.read_prompts()


def _write_part(
  model: Model,
  openings: Sequence[str],
  first: int,
  seen: set[str],
  progress: "Progress",
) -> tuple[list[str], dict[str, int]]:
  """Continues some openings, in batches; adds what it keeps to `seen`."""
  settings = model.config.synthesis
  counts = {"drawn": len(openings), "never_ending": 0, "empty": 0}
  counts |= {"duplicates": 0, "kept": 0}
  kept: list[str] = []
  for start in range(0, len(openings), settings.batch_size):
    rows = openings[start : start + settings.batch_size]
    replies = _write_turns(model, rows, settings.seed + first + start)
    progress.update(replies)
    for opening, reply in zip(rows, replies, strict=True):
      text = (opening + reply.text).strip()
      if reply.tokens[-1] not in model.stop_ids:
        counts["never_ending"] += 1
      elif len(text) <= len(opening.strip()):
        counts["empty"] += 1
      elif text in seen:
        counts["duplicates"] += 1
      else:
        counts["kept"] += 1
        seen.add(text)
        kept.append(text)
  return kept, counts


def _write_turns(
  model: Model, openings: Sequence[str], seed: int
) -> list[Completion]:
  """Continues a user turn that starts with each opening."""
  settings = model.config.synthesis
  sampling = Sampling(settings.prompt_temperature, min_p=settings.prompt_min_p)
  tokenizer = _tokenizer(model)
  prefix = tokenizer.user_turn_prefix()
  prompts = [tokenizer.encode(prefix + text) for text in openings]
  return _decode(model, sampling, prompts, settings.prompt_tokens, seed)


# --- Answers ------------------------------------------------------------------


def answer_prompts(
  model: Model, writer: CorpusWriter, prompts: Sequence[str]
) -> None:
  """Answers prompts shard by shard, from the first shard not yet written."""
  settings = model.config.synthesis
  size = settings.shard_sequences
  with Progress("answers", len(prompts)) as progress:
    for number, first in enumerate(range(0, len(prompts), size)):
      part = prompts[first : first + size]
      if number < len(writer.index["shards"]):
        progress.skip(len(part))
        continue
      examples, counts = _answer_shard(model, part, first, progress)
      writer.add_shard(examples, counts)


def _answer_shard(
  model: Model, prompts: Sequence[str], first: int, progress: "Progress"
) -> tuple[list[Example], dict[str, int]]:
  """Answers one shard's prompts, batched by length, and filters the answers."""
  settings = model.config.synthesis
  sampling = Sampling(settings.answer_temperature, min_p=settings.answer_min_p)
  # Noise streams of their own: prompts were drawn from the ones before.
  seed = settings.seed + settings.num_self_prompts + first
  tokenizer = _tokenizer(model)
  encoded = [
    tokenizer.encode_chat([{"role": "user", "content": prompt}])
    for prompt in prompts
  ]
  fitting = [
    i for i, ids in enumerate(encoded) if len(ids) <= settings.max_prompt_tokens
  ]
  fitting.sort(key=lambda i: len(encoded[i]))
  progress.skip(len(prompts) - len(fitting))
  counts = {"prompts": len(prompts), "over_long": len(prompts) - len(fitting)}
  counts |= {"empty": 0, "never_ending": 0, "kept": 0, "answer_tokens": 0}
  examples = {}
  for start in range(0, len(fitting), settings.batch_size):
    rows = fitting[start : start + settings.batch_size]
    replies = _decode(
      model,
      sampling,
      [encoded[i] for i in rows],
      settings.max_answer_tokens,
      seed + start,
    )
    progress.update(replies)
    for i, reply in zip(rows, replies, strict=True):
      if len(reply.tokens) < settings.min_answer_tokens:
        counts["empty"] += 1
      elif is_loop(reply.tokens, model.stop_ids):
        counts["never_ending"] += 1
      else:
        counts["kept"] += 1
        counts["answer_tokens"] += len(reply.tokens)
        examples[i] = Example(
          tokens=np.array(encoded[i] + reply.tokens, np.int32),
          prompt_length=len(encoded[i]),
          held_out=is_held_out(prompts[i], settings.held_out),
        )
  return [examples[i] for i in sorted(examples)], counts


def is_loop(tokens: Sequence[int], stop_ids: Sequence[int]) -> bool:
  """Whether an answer never ended and its tail only repeats a short phrase."""
  tail = tokens[-LOOP_TOKENS:]
  if tokens[-1] in stop_ids or len(tail) < LOOP_TOKENS:
    return False
  return any(
    tail[period:] == tail[:-period] for period in range(1, LOOP_PERIOD + 1)
  )


def _tokenizer(model: Model) -> Tokenizer:
  if model.tokenizer is None:
    raise ConfigError("this target has no tokenizer; it cannot answer text")
  return model.tokenizer


def _decode(
  model: Model,
  sampling: Sampling,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  seed: int,
) -> list[Completion]:
  """Decodes one batch; row r draws from noise stream seed + r."""
  batch = model.config.synthesis.batch_size
  longest = max(len(p) for p in prompts)
  chunk = bucket(longest, model.config.decode.prefill_chunk)
  session = Session(
    model=model,
    decoder=model.decoder(sampling),
    batch=batch,
    capacity=-(-longest // chunk) * chunk + max_new_tokens,
    max_new_tokens=max_new_tokens,
  )
  rows = len(prompts)
  seeds = range(seed, seed + rows)
  return session.reply(prompts, [max_new_tokens] * rows, seeds=seeds)


class Progress:
  """A bar over prompts, with generated tokens per second."""

  def __init__(self, name: str, total: int):
    self._bar = tqdm.tqdm(total=total, desc=name, unit="prompt")
    self._tokens = 0
    self._start = time.perf_counter()

  def __enter__(self) -> "Progress":
    return self

  def skip(self, prompts: int) -> None:
    """Counts prompts that need no work now."""
    self._bar.initial += prompts
    self._bar.update(prompts)

  def update(self, replies: Sequence[Completion]) -> None:
    """Counts a batch of replies."""
    self._tokens += sum(len(reply.tokens) for reply in replies)
    rate = self._tokens / (time.perf_counter() - self._start)
    self._bar.set_postfix_str(f"{rate:.0f} tokens/s")
    self._bar.update(len(replies))

  def __exit__(self, *_: object) -> None:
    self._bar.close()


def main(config: Config) -> None:
  """Entry point of python -m train.synthesize."""
  synthesize(config)


if __name__ == "__main__":
  command.run(main, errors=(FileError,))
