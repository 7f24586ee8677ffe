"""Decodes in the middle of training: real, lossless, compiled once."""

import jax
import jax.numpy as jnp
import pytest

from dflash_jax.config import Config, TargetSource
from dflash_jax.decode import Decoder
from tests.train.conftest import ANSWER_TOKENS, HELD_OUT
from train.loop import evaluate
from train.preview import Preview


@pytest.fixture(scope="module")
def preview(setup) -> Preview:
  """Of all held-out prompts, as many tokens as their answers have."""
  config = Config(
    target=TargetSource(random=setup.trainer.target.config),
    train=setup.trainer.config,
  )
  config.train.decode_prompts = 5  # more than there are
  config.train.decode_tokens = ANSWER_TOKENS
  return Preview.create(config, setup)


def test_it_decodes_the_prompts_of_held_out_answers(preview, setup):
  corpus = setup.corpus
  assert len(preview.prompts) == HELD_OUT
  for prompt, index in zip(preview.prompts, corpus.held_out, strict=True):
    tokens, mask = corpus.example(index)
    assert prompt == tokens[~mask].tolist()


def test_its_text_is_the_targets_and_its_tau_that_of_the_walk(
  preview, setup, trained
):
  state, _ = trained
  found = preview.decode(state.drafter)
  corpus, tokenizer = setup.corpus, preview.model.tokenizer
  answers = []
  for index in corpus.held_out:
    tokens, mask = corpus.example(index)
    answers.append(tokens[mask].tolist())
  assert found["text"] == tokenizer.decode(answers[0])
  assert found["tokens"] == sum(map(len, answers))
  walked, _ = evaluate(setup, state)
  assert found["tau"] == pytest.approx(walked.tau)
  assert found["tau"] > 1.1  # it has learned something to be right about
  assert len(found["acceptance"]) == setup.trainer.drafter.max_drafts


def test_it_is_compiled_once_whatever_the_drafter_has_learned(
  preview, setup, trained
):
  state, _ = trained
  first = preview.decode(state.drafter)
  before = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
  other = jax.tree.map(jnp.zeros_like, state.drafter)
  assert preview.decode(other)["tau"] < first["tau"]
  after = Decoder.prefill._cache_size(), Decoder.run_rounds._cache_size()
  assert after == before
