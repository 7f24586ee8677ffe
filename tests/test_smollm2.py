"""The default target, real weights: forward, greedy text, losslessness."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import smollm2_135m
from dflash_jax import generate, load
from dflash_jax.model import Model
from dflash_jax.prompts import read_prompts
from dflash_jax.session import Completion, Session

pytestmark = pytest.mark.optimized

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "smollm2"
PROMPTS = json.loads((GOLDENS / "prompts.json").read_text())
EVERY = pytest.param(len(PROMPTS), marks=pytest.mark.slow, id="every prompt")


@pytest.fixture(scope="module")
def model() -> Model:
  """SmolLM2-135M-Instruct in float32, with the shipped drafter."""
  return load(smollm2_135m.get_config())


@pytest.fixture(scope="module")
def plain(model) -> Model:
  """The same target without a drafter."""
  return model.without_drafter()


@pytest.mark.parametrize("name", ["chat", "plain"])
def test_logits_and_taps_match_transformers(plain, name):
  golden = load_file(GOLDENS / "forward.safetensors")
  golden = {
    key.removeprefix(f"{name}."): value
    for key, value in golden.items()
    if key.startswith(name)
  }
  tokens = jnp.asarray(golden["tokens"])[None]
  layers = tuple(golden["tap_layers"].tolist())
  cache = plain.target.init_cache(1, tokens.size)
  hidden, taps, _ = plain.target.forward(
    plain.params.target, tokens, cache, layers
  )
  logits = plain.target.logits(plain.params.target, hidden)
  np.testing.assert_allclose(
    logits[0, golden["logit_positions"]], golden["logits"], atol=2e-4
  )
  taps = np.split(np.asarray(taps[0, golden["tap_positions"]]), len(layers), 1)
  # The first token's states reach 25,000: float32 keeps 7 digits of them.
  np.testing.assert_allclose(taps, golden["taps"], atol=2e-4, rtol=2e-5)


def decode(
  model: Model, goldens: list[dict[str, Any]], rows: int, max_new_tokens: int
) -> list[Completion]:
  """Replies to the prompts of goldens, so many rows at a time."""
  prompts = [golden["prompt_tokens"] for golden in goldens]
  replies: list[Completion] = []
  for first in range(0, len(prompts), rows):
    session = Session(
      model=model,
      decoder=model.decoder(),
      batch=rows,
      capacity=356,
      max_new_tokens=100,
    )
    part = prompts[first : first + rows]
    replies += session.reply(part, [max_new_tokens] * len(part))
  return replies


@pytest.mark.parametrize("count", [8, EVERY])
def test_greedy_text_matches_transformers(plain, count):
  goldens = PROMPTS[:count]
  replies = [reply.tokens for reply in decode(plain, goldens, 4, 100)]
  assert replies == [golden["greedy_tokens"] for golden in goldens]


@pytest.mark.parametrize("count", [8, EVERY])
@pytest.mark.parametrize("rows", [1, 4])
def test_speculative_text_matches_transformers_too(model, rows, count):
  goldens = PROMPTS[:count]
  replies = decode(model, goldens, rows, 64)
  assert [reply.tokens for reply in replies] == [
    golden["greedy_tokens"][:64] for golden in goldens
  ]
  drafted = sum(len(reply.tokens) - 1 for reply in replies)
  tau = drafted / sum(reply.rounds for reply in replies)
  assert tau > 1.5, f"the drafter barely helps: tau {tau:.2f}"


@pytest.mark.parametrize("width", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_a_narrower_or_wider_verify_width_changes_no_token(model, width):
  golden = PROMPTS[2]
  assert len(golden["greedy_tokens"]) == 100
  model = with_decode(model, width=f"fixed:{width}")
  (reply,) = decode(model, [golden], 1, 100)
  assert reply.tokens == golden["greedy_tokens"]


def with_decode(model: Model, **settings) -> Model:
  """The model, decoding in another way."""
  decode = dataclasses.replace(model.config.decode, **settings)
  config = dataclasses.replace(model.config, decode=decode)
  return dataclasses.replace(model, config=config)


@functools.cache
def plain_tokens(count: int, batch_size: int, max_new_tokens: int, **law):
  """What plain decoding makes of the first prompts of our own."""
  config = smollm2_135m.get_config()
  config.drafter.path = "none"
  replies = generate(
    with_decode(load(config), **law),
    mixed_prompts(count),
    batch_size=batch_size,
    max_new_tokens=max_new_tokens,
  )
  return [reply.tokens for reply in replies]


def differing(
  model: Model, count: int, law: dict, drafts: dict, **settings
) -> list[str]:
  """Prompts whose replies are not those of plain decoding of the same law.

  Two greedy replies may part where the target's two best logits are closer
  than TIE: float32 sums in another order, and either token is its argmax.
  """
  texts = mixed_prompts(count)
  ours = generate(with_decode(model, **law, **drafts), texts, **settings)
  expected = plain_tokens(count, **settings, **law)
  return [
    text
    for text, reply, tokens in zip(texts, ours, expected, strict=True)
    if reply.tokens != tokens
    and (law or gap_where_they_part(model, text, reply.tokens, tokens) > TIE)
  ]


def gap_where_they_part(
  model: Model, text: str, first: list[int], second: list[int]
) -> float:
  """How far apart the target has the two tokens at the first difference."""
  place = next(
    i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b
  )
  ids = model.tokenizer.encode_chat([{"role": "user", "content": text}])
  tokens = jnp.asarray([[*ids, *first[:place]]])
  hidden, _, _ = model.target.forward(
    model.params.target, tokens, model.target.init_cache(1, 0)
  )
  logits = model.target.logits(model.params.target, hidden[0, -1])
  return abs(float(logits[first[place]] - logits[second[place]]))


def mixed_prompts(count: int) -> list[str]:
  prompts = read_prompts("eval/prompts/mixed.jsonl", count)
  return [prompt.turns[0] for prompt in prompts]


TIE = 5e-5  # of logits near 30, whose float32 steps are 2e-6

DRAFTS = {
  "K=4": {"block_size": 4, "width": "fixed:3"},
  "K=8": {"width": "fixed:7", "draft_temperature": 0.8},
  "P=8": {"tree_nodes": 8},
  "P=32": {"tree_nodes": 32, "draft_temperature": 0.8},
}


@pytest.mark.parametrize(
  ("law", "drafts"),
  [
    pytest.param({}, {"tree_nodes": 11}, marks=pytest.mark.slow),
    ({"temperature": 1.0, "top_p": 0.9}, DRAFTS["P=8"]),
    ({"temperature": 0.6, "top_k": 50}, DRAFTS["K=8"]),
    pytest.param(
      {"temperature": 1.0, "top_k": 50},
      {"width": "threshold:0.3"},
      marks=pytest.mark.slow,
    ),
  ],
  ids=["greedy tree", "coupled tree", "coupled chain", "threshold"],
)
def test_trees_and_sampling_keep_the_tokens(model, law, drafts):
  settings = {"max_new_tokens": 32, "batch_size": 4}
  assert not differing(model, 4, law, drafts, **settings)


# --- Slow proofs --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
def test_greedy_tokens_are_plain_decodings_on_200_prompts(model, batch_size):
  settings = {"max_new_tokens": 128, "batch_size": batch_size}
  assert not differing(model, 200, {}, {}, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [8, 32])
def test_greedy_trees_give_plain_tokens_on_50_prompts(model, num_nodes):
  settings = {"max_new_tokens": 128, "batch_size": 4}
  drafts = {"tree_nodes": num_nodes}
  assert not differing(model, 50, {}, drafts, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_coupled_tokens_are_plain_samplings_on_100_prompts(
  model, temperature, top_p, name, batch_size
):
  law = {"temperature": temperature, "top_p": top_p}
  settings = {"max_new_tokens": 64, "batch_size": batch_size}
  assert not differing(model, 100, law, DRAFTS[name], **settings)
