"""Replies on a terminal: streamed text, block colours, statistics."""

import json
import os
import statistics
from collections.abc import Sequence
from typing import Any, TextIO

from dflash_jax.compare import Comparison
from dflash_jax.session import Completion, acceptance_per_position
from dflash_jax.tokenizer import StreamDecoder, Tokenizer
from dflash_jax.verify import GUARANTEES

_RESET = "\x1b[0m"
# Blue over green to red, from the 256-colour table: early slots to late ones.
_RAMP = (39, 45, 50, 48, 46, 82, 118, 154, 190, 226, 220, 214, 208, 202, 196)


class Printer:
  """Writes one reply as its tokens come.

  With block marks, tokens that were drafted are coloured by their block slot,
  or stand in brackets, a pair for each round, where there are no colours. Other
  tokens are the target's own: a round's correction or bonus token.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    out: TextIO,
    *,
    show_blocks: bool = False,
    max_drafts: int = 0,
  ):
    """Starts a reply.

    Args:
      tokenizer: of the target.
      out: where text goes.
      show_blocks: mark drafted tokens.
      max_drafts: P, drafts per round; the colours spread over them.
    """
    self._decoder = StreamDecoder(tokenizer)
    self._out = out
    self._show_blocks = show_blocks
    self._max_drafts = max_drafts
    self._has_colour = out.isatty() and "NO_COLOR" not in os.environ
    self._in_brackets = False

  def legend(self) -> str:
    """What the marks mean."""
    if not self._has_colour:
      return "[drafted and accepted] the target's own"
    slots = range(1, self._max_drafts + 1)
    keys = [self._coloured(str(slot), slot) for slot in slots]
    return "block slot: target's own " + " ".join(keys)

  def write(self, ids: Sequence[int], slots: Sequence[int]) -> None:
    """Shows more tokens of the reply."""
    if self._show_blocks:
      for token, slot in zip(ids, slots, strict=True):
        self._out.write(self._marked(self._decoder.push([token]), slot))
    else:
      self._out.write(self._decoder.push(ids))
    self._out.flush()

  def end(self) -> None:
    """Ends the reply and its line."""
    text = self._decoder.flush()
    self._out.write(text + ("]" if self._in_brackets else "") + "\n")
    self._out.flush()

  def _marked(self, text: str, slot: int) -> str:
    if self._has_colour:
      return self._coloured(text, slot)
    is_new_block = slot == 1 or (slot > 1 and not self._in_brackets)
    close = "]" if self._in_brackets and (slot == 0 or is_new_block) else ""
    self._in_brackets = slot > 0
    return close + ("[" if is_new_block else "") + text

  def _coloured(self, text: str, slot: int) -> str:
    if slot == 0 or not text:
      return text
    index = (slot - 1) * len(_RAMP) // max(self._max_drafts, slot)
    return f"\x1b[38;5;{_RAMP[index]}m{text}{_RESET}"


def statistics_of(completion: Completion) -> str:
  """A reply's statistics, in two or three lines."""
  lines = [
    f"{completion.prompt_tokens} prompt tokens, "
    f"{len(completion.tokens)} new tokens, {completion.rounds} rounds, "
    f"tau {completion.tau:.2f} (tokens per round, bonus included)",
    f"TTFT {completion.ttft_s * 1e3:.0f} ms, "
    f"TPOT {completion.tpot_s * 1e3:.1f} ms, "
    f"{completion.tokens_per_s:.1f} tokens/s",
  ]
  if len(completion.accepted) > 1:
    lines.insert(1, "acceptance by slot: " + _shares(completion.accepted))
    if completion.width != len(completion.accepted) - 1:  # a tree, or a policy
      lines[1] += f"  ({completion.width:.1f} drafts verified per round)"
  return "\n".join(lines)


def comparison_of(comparison: Comparison) -> str:
  """Both speeds of a reply, and whether its tokens are the same."""
  return (
    f"plain decoding {comparison.plain.tokens_per_s:.1f} tokens/s, "
    f"speed-up {comparison.speedup:.2f}x, "
    f"identical tokens: {'yes' if comparison.is_identical else 'no'}"
    + _caveat(comparison.guarantee)
  )


def _caveat(guarantee: str) -> str:
  """What a rule promises, where it is not the tokens themselves."""
  return "" if guarantee == "tokens" else f" ({GUARANTEES[guarantee]})"


def summary_of(comparisons: Sequence[Comparison]) -> str:
  """Several replies together: pooled tau, medians of speeds."""
  ours = [c.speculative for c in comparisons]
  rounds = sum(c.rounds for c in ours)
  emitted = sum(max(len(c.tokens) - 1, 0) for c in ours)
  same = sum(c.is_identical for c in comparisons)
  plain = statistics.median(c.plain.tokens_per_s for c in comparisons)
  fast = statistics.median(c.tokens_per_s for c in ours)
  ratio = statistics.median(c.speedup for c in comparisons)
  verdict = "yes" if same == len(ours) else f"no ({same} of {len(ours)})"
  return (
    f"{len(ours)} replies: tau {emitted / max(rounds, 1):.2f}, medians: plain "
    f"{plain:.1f} tokens/s, speculative {fast:.1f} tokens/s, speed-up "
    f"{ratio:.2f}x; identical tokens: {verdict}"
    + _caveat(comparisons[0].guarantee)
  )


def json_line(
  completion: Completion, comparison: Comparison | None = None
) -> str:
  """One JSON object, in one line."""
  names = ("text", "tokens", "rounds", "tau", "ttft_s", "tpot_s")
  record: dict[str, Any] = {n: getattr(completion, n) for n in names}
  record["tokens_per_s"] = completion.tokens_per_s
  if comparison is not None:
    record["plain_tokens_per_s"] = comparison.plain.tokens_per_s
    record["speedup"] = comparison.speedup
    record["identical"] = comparison.is_identical
    record["guarantee"] = comparison.guarantee
  return json.dumps(record)


def _shares(accepted: Sequence[int]) -> str:
  shares = enumerate(acceptance_per_position(accepted), start=1)
  return "  ".join(f"{slot}: {share:.0%}" for slot, share in shares)
