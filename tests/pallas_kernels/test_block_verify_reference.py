"""block_verify in plain XLA: the decode loop's own rules, formulas, the law."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax.noise import Stream
from dflash_jax.proposal import Law, Moment, Proposal
from dflash_jax.sampling import Sampling
from dflash_jax.verify import Verifier
from pallas_kernels import noise
from pallas_kernels.block_verify import api, rule
from pallas_kernels.block_verify.config import CHUNK_STEP, choose_config
from pallas_kernels.block_verify.reference import XlaPasses
from pallas_kernels.block_verify.rule import Streams
from pallas_kernels.block_verify.shapes import VOCABULARIES
from pallas_kernels.devices import Device

STREAMS = Streams(Stream.ACCEPT, Stream.RECOVERY, Stream.BONUS)


def arguments(B, P, V, *, seed=0, near=1.0, draft_temperature=1.1):
  """Random logits, drafts drawn from the drafter's, and addresses."""
  rng = np.random.default_rng(seed)
  target = 2 * rng.normal(size=(B, P + 1, V))
  draft = target[:, :P] + near * rng.normal(size=(B, P, V))
  noise = rng.gumbel(size=draft.shape)
  drafts = (draft / draft_temperature + noise).argmax(-1)
  return (
    jnp.array(target, jnp.float32),
    jnp.array(draft, jnp.float32),
    jnp.array(drafts, jnp.int32),
    jnp.array(rng.integers(0, 2**32, B, np.uint32)),
    jnp.array(rng.integers(0, 999, B), jnp.int32),
  )


def call(name, *operands, temperature=0.8, draft_temperature=1.1, **keywords):
  accepted, last = api.block_verify(
    *operands,
    rule=name,
    temperature=temperature,
    draft_temperature=draft_temperature,
    **dict(streams=STREAMS) | keywords,
  )
  return np.asarray(accepted), np.asarray(last)


@pytest.mark.parametrize("name", rule.RULES)
@pytest.mark.parametrize(("P", "V"), [(1, 97), (5, 128), (7, 1031)])
@pytest.mark.parametrize(
  "sampling",
  [Sampling(0.8), Sampling(0.8, top_k=5), Sampling(0.0)],
  ids=["plain", "top-k", "greedy"],
)
def test_the_loop_gets_what_a_trimmed_head_of_all_tokens_gets(
  name, P, V, sampling
):
  """verify.py's two ways, on logits and on columns that are all tokens."""
  B = 64
  target, draft, drafts, seeds, moments = arguments(B, P, V)
  # A width policy may verify fewer depths than were drafted.
  probs = jax.nn.softmax(jnp.concatenate([draft, -draft[:, :1]], axis=1) / 1.1)
  ones = jnp.ones((B, P), jnp.float32)
  verifier = Verifier(name, sampling, P)
  prediction = types.SimpleNamespace(logits=lambda: target)
  want, found = (
    verifier.judge(
      Proposal(drafts, ones, ones, law=Law(probs, ids, drafts[..., None])),
      prediction,
      Moment(seeds, moments),
    )
    for ids in (jnp.arange(V), None)
  )
  np.testing.assert_array_equal(found.accepted, want.accepted)
  np.testing.assert_array_equal(found.tokens, want.tokens)
  if sampling == Sampling(0.8):  # every end is among them
    assert len(set(np.asarray(found.accepted).tolist())) == P + 1


@pytest.mark.parametrize("name", rule.RULES)
def test_a_law_is_the_same_as_logits_and_as_probabilities(name):
  """Whether tokens that cannot be drawn are logits of -inf or zeros."""
  B, P, V = 64, 5, 131
  rng = np.random.default_rng(5)
  target, draft, _, seeds, moments = arguments(B, P, V)
  target, draft = (
    jnp.where(rng.random(x.shape) < 0.4, -jnp.inf, x) for x in (target, draft)
  )
  noisy = np.asarray(draft) / 1.1 + rng.gumbel(size=draft.shape)
  drafts = jnp.array(noisy.argmax(-1), jnp.int32)
  rest = drafts, seeds, moments
  p, q = jax.nn.softmax(target / 0.8), jax.nn.softmax(draft / 1.1)
  want = call(name, target, draft, *rest)
  none = dict(temperature=None, draft_temperature=None)
  for found in (
    call(name, p, q, *rest, **none),
    call(name, jnp.log(p), jnp.log(q), *rest, **dict.fromkeys(none, 1.0)),
    call(name, target, q, *rest, draft_temperature=None),
  ):
    np.testing.assert_array_equal(found, want)
  accepted, last = want
  rows = np.arange(B)
  assert (np.asarray(p)[rows, accepted, last] > 0).all()
  assert accepted.max() > 0 and accepted.min() < P


def brute_force(name, target, draft, drafts, draws, times):
  """accepted and last of one sequence, f64, token by token."""
  p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (target, draft))
  p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
  P, V = q.shape
  accepted, weight, scale = 0, 1.0, 1.0
  for i, x in enumerate(drafts):
    ratio = p[i, x] / q[i, x]
    if name == "token":
      if draws[i] > min(1, ratio):
        break
      accepted = i + 1
      continue
    weight = min(1.0, weight * ratio)
    odds = weight
    if i + 1 < P:
      mass = sum(max(weight * p[i + 1, y] - q[i + 1, y], 0) for y in range(V))
      odds = mass / (mass + 1 - weight) if mass + 1 - weight else 1.0
    if draws[i] <= odds:
      accepted, scale = i + 1, weight
  left = p[P]
  if accepted < P:
    left = np.maximum(scale * p[accepted] - q[accepted], 0)
  return accepted, int((left / times[accepted < P]).argmax())


@pytest.mark.parametrize("name", rule.RULES)
def test_the_formulas_by_brute_force(name):
  B, P, V = 40, 4, 23
  operands = arguments(B, P, V, seed=1)
  target, draft, drafts, seeds, moments = operands

  def draw(stream, count):
    streams = jnp.full((B,), stream, jnp.int32)
    found = noise.uniform(streams, seeds, moments, count)
    return np.asarray(found, np.float64)

  draws = draw(Stream.ACCEPT, P)
  times = [-np.log1p(-draw(s, V)) for s in (Stream.BONUS, Stream.RECOVERY)]
  want = [
    brute_force(
      name,
      np.asarray(target[b], np.float64) / 0.8,
      np.asarray(draft[b], np.float64) / 1.1,
      np.asarray(drafts[b]),
      draws[b],
      [t[b] for t in times],
    )
    for b in range(B)
  ]
  np.testing.assert_array_equal(np.stack(call(name, *operands), 1), want)


@pytest.mark.parametrize("name", rule.RULES)
def test_the_law_of_what_is_emitted_is_the_targets(name):
  """Two tokens of V=3, whose laws depend on the token before; chi-squared."""
  B, V = 60_000, 3
  rng = np.random.default_rng(2)
  tables = [rng.normal(size=shape) for shape in ((V,), (V, V), (V, V, V))]
  draft_tables = [rng.normal(size=shape) for shape in ((V,), (V, V))]

  def law(logits, temperature):
    weights = np.exp(logits / temperature)
    return weights / weights.sum(-1, keepdims=True)

  def draw(probs):
    return (probs.cumsum(-1) > rng.random((len(probs), 1))).argmax(-1)

  first = draw(np.broadcast_to(law(draft_tables[0], 1.1), (B, V)))
  second = draw(law(draft_tables[1], 1.1)[first])
  target = np.stack(
    [
      np.broadcast_to(tables[0], (B, V)),
      tables[1][first],
      tables[2][first, second],
    ],
    axis=1,
  )
  draft = np.stack(
    [np.broadcast_to(draft_tables[0], (B, V)), draft_tables[1][first]], axis=1
  )
  accepted, last = call(
    name,
    jnp.array(target, jnp.float32),
    jnp.array(draft, jnp.float32),
    jnp.array(np.stack([first, second], 1), jnp.int32),
    jnp.arange(B, dtype=jnp.uint32),
    jnp.zeros(B, jnp.int32),
  )
  one = np.where(accepted > 0, first, last)
  alone = draw(law(tables[1], 0.8)[one])
  two = np.select([accepted == 0, accepted == 1], [alone, last], second)
  counts = np.zeros((V, V))
  np.add.at(counts, (one, two), 1)
  want = B * law(tables[0], 0.8)[:, None] * law(tables[1], 0.8)
  assert ((counts - want) ** 2 / want).sum() < 26.1  # p = 0.001, 8 degrees


def test_equal_laws_accept_everything():
  target, _, _, seeds, moments = arguments(16, 3, 97)
  draft = target[:, :3]
  drafts = jnp.argmax(draft, axis=-1).astype(jnp.int32)
  for name in rule.RULES:
    accepted, _ = call(
      name, target, draft, drafts, seeds, moments, draft_temperature=0.8
    )
    assert (accepted == 3).all()


def test_an_empty_residual_falls_back_on_the_targets_law():
  """As if rounding had rejected a draft of a law that equals the target's."""
  target, _, _, seeds, moments = arguments(16, 1, 97)
  settings = rule.Rule("token", 0.8, 0.8, STREAMS)
  passes = XlaPasses(settings, target, target[:, :1], seeds, moments)
  none = jnp.zeros(16, jnp.int32)
  softmaxes = passes.measure()
  scale = jnp.ones(16, jnp.float32)
  ending = rule.end(settings, none, scale, *softmaxes)
  p = jax.nn.softmax(target[:, 0] / 0.8)
  streams = jnp.full_like(none, Stream.RECOVERY)
  times = noise.race_times(streams, seeds, moments, 97)
  np.testing.assert_array_equal(passes.race(ending), (p / times).argmax(-1))


# --- What is refused ----------------------------------------------------------

GOOD = arguments(2, 3, 8)


def replaced(index, array):
  return [array if i == index else x for i, x in enumerate(GOOD)]


@pytest.mark.parametrize(
  ("operands", "keywords", "message"),
  [
    (replaced(0, GOOD[0][0]), {}, "must have 3 axes"),
    (replaced(0, GOOD[0][:, :3]), {}, "must be (2, 4, 8): a row more"),
    (replaced(0, GOOD[0][:1]), {}, "must be (2, 4, 8)"),
    (replaced(1, GOOD[1][:, :0]), {}, "is empty; draft something"),
    (replaced(0, GOOD[0].astype(jnp.int32)), {}, "target is int32"),
    (replaced(1, GOOD[1].astype(jnp.int32)), {}, "draft is int32"),
    (replaced(2, GOOD[2][:, :2]), {}, "drafts is int32[2, 2]; use int32[2, 3]"),
    (replaced(3, GOOD[4]), {}, "seeds is int32[2]; use uint32[2]"),
    (replaced(4, GOOD[3]), {}, "moments is uint32[2]; use int32[2]"),
    (GOOD, dict(name="coupled"), "rule='coupled' is unknown; use one of"),
    (GOOD, dict(temperature=0.0), "temperature=0.0; use more than 0, or None"),
    (
      GOOD,
      dict(draft_temperature=float("nan")),
      "draft_temperature=nan; use more than 0",
    ),
    (GOOD, dict(streams=Streams(1, 1, 2)), "share noise, which biases"),
  ],
)
def test_what_nobody_could_compute_is_refused(operands, keywords, message):
  keywords = dict(name="block") | keywords
  with pytest.raises(ValueError) as refused:
    call(keywords.pop("name"), *operands, **keywords)
  assert message in str(refused.value)


def test_half_precision_logits_are_widened():
  half = [x.astype(jnp.bfloat16) for x in GOOD[:2]]
  wide = [x.astype(jnp.float32) for x in half]
  np.testing.assert_array_equal(
    call("block", *half, *GOOD[2:]), call("block", *wide, *GOOD[2:])
  )


@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    ((1, 2, 1024), jnp.bfloat16, "take float32, not bfloat16"),
    ((1, 2, 1026), jnp.float32, "in whole 4s, not 1026"),
    ((1, 2, 508), jnp.float32, "at least 512 in whole 4s, not 508"),
    ((2**10, 2**6, 2**15), jnp.float32, "fewer than 2^31 numbers"),
  ],
)
def test_what_kernels_cannot_take_is_said(shape, dtype, message):
  target = jax.ShapeDtypeStruct(shape, dtype)
  draft = jax.ShapeDtypeStruct((shape[0], shape[1] - 1, shape[2]), dtype)
  assert message in api._kernel_limit(target, draft)


def test_a_limit_met_on_a_gpu_is_told_or_worked_around(monkeypatch):
  hopper = Device("a GPU", "sm90", 132)
  monkeypatch.setattr(Device, "current", lambda: hopper)
  with pytest.raises(NotImplementedError, match="at least 512.*use 'xla'"):
    call("block", *GOOD, implementation="sm90")
  for ours, theirs in zip(
    call("block", *GOOD),
    call("block", *GOOD, implementation="xla"),
    strict=True,
  ):
    np.testing.assert_array_equal(ours, theirs)


def test_kernels_need_their_device():
  for implementation in ("sm90", "sm100"):
    with pytest.raises(NotImplementedError, match="cannot run on cpu"):
      call("block", *GOOD, implementation=implementation)
  with pytest.raises(ValueError, match="is unknown; choose one of"):
    call("block", *GOOD, implementation="sm80")


def test_chunks_cover_real_vocabularies():
  for V, field in itertools.product(
    (512, 700, 1028, *VOCABULARIES.values()), ("measured", "compared", "raced")
  ):
    size = getattr(choose_config(V), field)
    assert size % CHUNK_STEP == 0 and 0 < size <= V
