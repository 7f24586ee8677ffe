"""Speed figures: medians of ratios, and identity that can fail."""

import dataclasses

import pytest

from dflash_jax.compare import Comparison
from dflash_jax.config import EvalConfig
from dflash_jax.prompts import Prompt
from eval import speed
from tests.eval.test_acceptance import completion
from tests.testing import tiny_model


def timed(seconds, *, tokens=5, ttft=0.5):
  """A reply at so many seconds per token."""
  return dataclasses.replace(
    completion(tokens, [tokens, 0]),
    tpot_s=seconds,
    tokens_per_s=1 / seconds if seconds else 0.0,
    ttft_s=ttft,
  )


def test_speedup_is_the_median_of_ratios():
  found = speed.summarize(
    [
      Comparison(speculative=timed(0.1), plain=timed(0.2)),
      Comparison(speculative=timed(0.2, ttft=0.9), plain=timed(0.3)),
      Comparison(speculative=timed(0.5), plain=timed(0.4)),
    ]
  )
  assert found.speedup == pytest.approx(1.5)
  assert found.plain_tokens_per_s == pytest.approx(1 / 0.3)
  assert found.speculative_tokens_per_s == pytest.approx(1 / 0.2)
  assert found.speculative_ttft_s == 0.5
  assert found.identical_fraction == 1


def test_reply_of_one_token_counts_for_identity_only():
  short = timed(0.0, tokens=0)
  found = speed.summarize(
    [
      Comparison(speculative=timed(0.1), plain=timed(0.2)),
      Comparison(speculative=short, plain=short),
    ]
  )
  assert found.speedup == pytest.approx(2)
  assert found.identical_fraction == 1


def test_other_tokens_are_not_identical():
  other = dataclasses.replace(timed(0.2), tokens=[1] * 6)
  found = speed.summarize(
    [
      Comparison(speculative=timed(0.1), plain=timed(0.2)),
      Comparison(speculative=timed(0.1), plain=other),
    ]
  )
  assert found.identical_fraction == 0.5


def test_prompts_are_decoded_both_ways_in_order():
  prompts = [Prompt(("Hello",)), Prompt(("a", "b")), Prompt(("unused",))]
  settings = EvalConfig(limit=2, max_new_tokens=7, batch_size=2, repeats=2)
  model = tiny_model()
  found = speed.decode_both_ways(model, prompts, settings)
  assert len(found) == 3
  assert all(c.is_identical and c.speedup > 0 for c in found)
  assert all(c.plain.accepted == [6] for c in found)
  assert len({tuple(c.plain.tokens) for c in found}) == 3
  measured = speed.evaluate(model, prompts[:1], settings)
  assert measured.identical_fraction == 1
