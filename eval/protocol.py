"""What the numbers of an evaluation are, and how they are taken.

Every JSON carries these texts, and docs/protocol.md explains them; a test holds
the two together.
"""

from dflash_jax.verify import GUARANTEES
from eval.bootstrap import COVERAGE, DRAWS

PLAIN = "plain"  # what plain decoding is called beside drafters
# Two logits this close may change places between passes of different shapes,
# in float32: rounding, not a mistake.
TIE = 5e-5

CONVENTIONS = {
  "tau": "tokens emitted per target pass after prefill, bonus token included",
  "tau_per_request": "mean over replies of each reply's tau",
  "tau_per_round": "tokens of all replies / rounds of all replies",
  "acceptance_per_position": "rounds with >= i accepted drafts / rounds",
  "conditional_acceptance": "rounds with >= i / rounds with >= i - 1",
  "histogram": "rounds by number of drafts accepted, 0..D, before budget or "
  "stop; D is the most that a round can accept: the block's drafts, or fewer "
  "where fewer nodes are verified",
  "width": "drafted nodes verified per round, mean over the rounds of all "
  "replies",
  "guarantee": "; ".join(f"{key}: {text}" for key, text in GUARANTEES.items()),
  "drafter_bytes": "own weights: 8-bit kernels, else config.target.dtype",
  "tokens_per_s": "median over replies, per request, first token excluded",
  "speedup": "median over replies of plain / speculative time per token",
  "intervals": f"{COVERAGE:.0%}, [low, high]; see protocol",
}

PROTOCOL = {
  "order": "Each batch of prompts is decoded plainly and by every drafter, one "
  "right after the other, in one process; a machine that slows down for a "
  "while slows all alike.",
  "warm_up": "Every program is compiled, and run once, before a clock starts.",
  "prefill": "Reading the prompt is not part of tokens/s or speed-up; it is "
  "reported as time to first token, the drafter's share included.",
  "budgets": "A reply ends at its stop token or after exactly "
  "eval.max_new_tokens tokens, the same for every drafter.",
  "seeds": "Nothing is drawn at temperature 0. Above it a conversation's noise "
  "comes from decode.seed and its place in the prompt set alone, so that plain "
  "decoding and every drafter draw with the same noise.",
  "intervals": f"{COVERAGE:.0%} intervals are percentiles of {DRAWS:,} draws "
  "of prompts with replacement, with a fixed seed; all turns of a prompt stay "
  "together, and what is compared on the same prompts is drawn together "
  "(paired bootstrap). They cover the choice of prompts, not of machine, day "
  "or training seed.",
  "identity": "Losslessness, first rung: in float32 every reply of a rule that "
  "promises the tokens is plain decoding's, token for token; where one is not, "
  f"the first difference must be a tie, two logits within {TIE:g}.",
  "rescoring": "Second rung: every reply is read again by the target alone, "
  "its own tokens fed back whatever the target would say, in passes of the "
  "shape that verified it; the target must choose every one of its tokens.",
  "rounding": "Third rung, in bfloat16: the share of identical replies, and "
  "the gap between the two best logits where a reply first differs. Two shapes "
  "of the same pass round apart there, so the share alone says little.",
  "round_time": "A round's draft, verify and commit are jitted apart, each "
  "timed to its end; verify ends with the verdict, commit keeps what was "
  "accepted and has the drafter absorb it. Host is what a dispatch of no "
  "rounds costs, launch and look together, by the rounds of a real one. The "
  "whole is a real dispatch by its rounds; parts and whole take turns, and "
  "medians are reported.",
  "memory": "Bytes of parameters and caches are sums over arrays; the peak is "
  "the device's own count or, where it keeps none, the most that the whole "
  "process has had resident.",
  "concurrency": "So many requests are in flight on the engine until all are "
  "done, plain and speculative in turns. A throughput ratio is quoted only at "
  "an interactivity that plain decoding reaches.",
}
