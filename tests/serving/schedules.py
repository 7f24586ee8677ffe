"""Random schedules of requests, and what each must answer whatever the mix."""

import dataclasses
import random

import jax
import jax.numpy as jnp

from dflash_jax.drafters import LanguageModel
from dflash_jax.engine import Engine, EngineConfig, Request, Result
from dflash_jax.model import Model
from dflash_jax.sampling import GREEDY, Sampling
from dflash_jax.serving.requests import Handle
from tests.testing import tiny_model

VOCAB = 31
DRAFTS = 3
PAGE = 4
LAWS = [
  GREEDY,
  Sampling(1.0),
  Sampling(0.7, top_p=0.9),
  Sampling(1.5, top_k=5),
  Sampling(1.0, min_p=0.1),
]
# Pages run out, prompts come in pieces, and rows are always too few.
CONFIG = EngineConfig(
  sizes=(3,),
  queue=10_000,
  capacity=96,
  max_new_tokens=24,
  page=PAGE,
  prefix_bytes=70_000,
  max_stops=2,
)


def near_model(
  kind: type[LanguageModel] = LanguageModel, vocab: int = VOCAB, **decode
) -> Model:
  """A random target whose drafter is a blurred copy of itself.

  It is right often enough that drafts from a wrong context show.
  """
  decode = {
    "width": f"fixed:{DRAFTS}",
    "prefill_chunk": 16,
    "rounds_per_dispatch": 2,
  } | decode
  model = tiny_model(vocab, drafter=False, **decode)

  def blur(x: jax.Array) -> jax.Array:
    noise = jax.random.normal(jax.random.key(x.size), x.shape)
    return x * (1 + 0.03 * noise)

  params = jax.tree.map(blur, model.params.target)
  drafter = kind(model.target.config, DRAFTS)
  everything = dataclasses.replace(model.params, drafter=params)
  return dataclasses.replace(model, drafter=drafter, params=everything)


def lanes(model: Model) -> dict[str, Model]:
  """The model with its drafter, and without."""
  return {"near": model, "none": model.without_drafter()}


def random_request(rng: random.Random, families: list[list[int]]) -> Request:
  """One that begins like others of its family."""
  family = rng.choice(families)
  own = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
  prompt = family[: rng.randrange(len(family) + 1)] + own
  stops = tuple(rng.sample(range(VOCAB), rng.randrange(3)))
  return Request(
    prompt=prompt,
    max_new_tokens=rng.randrange(1, 25),
    sampling=rng.choice(LAWS),
    seed=rng.randrange(2**32),
    lane=rng.choice(["near", "near", "none"]),
    priority=rng.randrange(3),
    stop_ids=stops,
    shares_prefix=rng.random() < 0.9,
  )


def random_requests(rng: random.Random, count: int) -> list[Request]:
  """Of a few families."""
  families = [
    [rng.randrange(VOCAB) for _ in range(rng.randrange(60))] for _ in range(5)
  ]
  return [random_request(rng, families) for _ in range(count)]


def submit(engine: Engine, request: Request, is_doomed: bool) -> Handle:
  """Submits a request; one that is doomed is cancelled by its first tokens."""
  handles: list[Handle] = []

  def cancel(*_) -> None:
    handles[0].cancel()

  if is_doomed:
    request = dataclasses.replace(request, on_tokens=cancel)
  handles.append(engine.submit(request))
  return handles[0]


def run(
  engine: Engine, rng: random.Random, requests: list[Request]
) -> list[Result]:
  """Submits in bursts between turns; one in five is cancelled.

  Half of them at some time, most of them still in the queue; half with their
  first tokens.
  """
  handles: list[Handle] = []
  doomed: list[tuple[int, Handle]] = []
  waiting, turn = list(requests), 0
  while waiting or doomed:
    for _ in range(rng.choice([0, 0, 1, 2, 9])):
      if waiting:
        is_doomed = rng.random() < 0.1
        handles.append(submit(engine, waiting.pop(0), is_doomed))
        if rng.random() < 0.1:
          doomed.append((turn + rng.randrange(12), handles[-1]))
    for _, handle in [pair for pair in doomed if pair[0] <= turn]:
      handle.cancel()
    doomed = [pair for pair in doomed if pair[0] > turn]
    engine.step()
    turn += 1
  engine.run()
  return [handle.result(0) for handle in handles]


def answer_alone(engine: Engine, request: Request, lane: str) -> Result:
  """The same request, with nobody else in the engine and nothing shared."""
  alone = dataclasses.replace(request, lane=lane, shares_prefix=False)
  handle = engine.submit(alone)
  engine.run()
  return handle.result(0)


def check_mixed(model: Model, seed: int, count: int, config=CONFIG) -> Engine:
  """Runs a random schedule, and asserts that nobody noticed the others.

  Tokens are those of plain decoding alone; rounds and accepted drafts those of
  the request's own lane alone.
  """
  rng = random.Random(seed)
  requests = random_requests(rng, count)
  engine = Engine(lanes(model), config)
  results = run(engine, rng, requests)
  quiet = Engine(lanes(model), config)
  for request, found in zip(requests, results, strict=True):
    plain = answer_alone(quiet, request, "none")
    own = answer_alone(quiet, request, request.lane)
    assert own.tokens == plain.tokens
    if found.finish == "cancelled":
      assert found.tokens == plain.tokens[: len(found.tokens)]
      continue
    assert found.tokens == plain.tokens, request
    assert found.finish == plain.finish
    assert found.accepted == own.accepted, request
  check_empty(engine)
  return engine


def check_empty(engine: Engine) -> None:
  """Asserts that an engine that ran to the end holds nothing for anybody."""
  usage = engine.usage()
  assert (usage.waiting, usage.rows, usage.pages_used) == (0, 0, 0)
  for lane in engine.lanes.values():
    lane.shelf.prefixes.check()
    if lane._batch is not None:
      assert jnp.all(lane._batch.done)
  engine.close()
  usage = engine.usage()
  assert (usage.pages_kept, usage.bytes) == (0, 0)
