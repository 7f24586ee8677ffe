"""lm_head_verify: kernels against the reference, the reference itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lm_head_verify import Draws, api, lm_head_verify
from tests.pallas_kernels.interpreter import SOUND, Job, Mutant, run

CHECK = "tests.pallas_kernels.checks:lm_head_verify"
KERNELS = ("sm90", "sm100")
# Fewer tiles than CTAs, one step, one row, last tiles cut short in every
# direction, more rows than a tile, every epilogue.
SHAPES = (
  dict(rows=1, width=64, vocabulary=97, asks=False),
  dict(rows=13, width=136, vocabulary=1304, vocab_axis=1, draws=True),
  dict(rows=8, width=64, vocabulary=301, draws=True, asks=False),
  dict(rows=1, width=200, vocabulary=1031, cores=2, draws=True),
  dict(rows=31, width=128, vocabulary=640, softcap=9.0),
  dict(rows=37, width=192, vocabulary=1031, cores=2, draws=True),
  dict(rows=67, width=64, vocabulary=1304, vocab_axis=1, softcap=20.0),
  dict(rows=128, width=328, vocabulary=769, cores=1),
  dict(rows=131, width=64, vocabulary=1100, cores=5, draws=True),
)
FEW = dict(rows=3, width=520, vocabulary=700, cores=2)  # swapped
MANY = dict(rows=67, width=520, vocabulary=1700, cores=2)
DRAWN = dict(rows=31, width=64, vocabulary=301, cores=2, draws=True)
TIES = dict(rows=67, width=64, vocabulary=1700, cores=4)
NEGATIVE = dict(rows=3, width=64, vocabulary=301, cores=2, negative=True)
STREAM = dict(rows=67, width=64, vocabulary=1700, cores=1)


def jobs(architecture, shapes):
  return [Job(CHECK, dict(architecture=architecture, **s)) for s in shapes]


@pytest.mark.parametrize("architecture", KERNELS)
def test_kernels_find_what_the_reference_finds(architecture):
  assert run(jobs(architecture, SHAPES[:2]), 60) == [SOUND] * 2


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", KERNELS)
def test_kernels_find_it_at_every_shape(architecture):
  verdicts = run(jobs(architecture, SHAPES[2:]), 60)
  assert verdicts == [SOUND] * len(verdicts)


# --- Planted bugs -------------------------------------------------------------

SHARED = (
  (
    "mask lets one more token in",
    "tiles.py",
    "ids < work",
    "ids <= work",
    NEGATIVE,
  ),
  (
    "tiles overlap",
    "tiles.py",
    "(cta + tile * self.ctas) * self.config.tile_vocab",
    "(cta + tile) * self.config.tile_vocab",
    FEW,
  ),
  (
    "a CTA leaves its last tile out",
    "tiles.py",
    "lax.div(tiles - 1 - cta, self.ctas) + 1",
    "lax.div(tiles - cta, self.ctas)",
    FEW,
  ),
  (
    "the last of a tie wins",
    "row_stats.py",
    "jnp.where(tile_top > part.top, tile_best",
    "jnp.where(tile_top >= part.top, tile_best",
    STREAM,
  ),
  (
    "the runner-up forgets the old top",
    "row_stats.py",
    "runner_up = jnp.minimum(part.top, tile_top)",
    "runner_up = tile_top * 0 + LOWEST",
    STREAM,
  ),
  (
    "the sum is not rescaled",
    "row_stats.py",
    "part.total * jnp.exp(part.top - top)",
    "part.total",
    FEW,
  ),
  (
    "CTAs tie towards the highest id",
    "row_stats.py",
    "lower = jnp.minimum(token, other)",
    "lower = jnp.maximum(token, other)",
    TIES,
  ),
  (
    "CTAs that lost the tie are no runners-up",
    "row_stats.py",
    "runner_up = jnp.minimum(left.top, right.top)",
    "runner_up = jnp.where(left.top == right.top, LOWEST, "
    "jnp.minimum(left.top, right.top))",
    TIES,
  ),
  (
    "CTAs' sums are not rescaled",
    "row_stats.py",
    "right.total * jnp.exp(right.top - top)",
    "right.total",
    FEW,
  ),
  (
    "the token asked about is the seed",
    "tiles.py",
    "address(2 if work.draws else 0)",
    "address(0)",
    DRAWN,
  ),
  (
    "every token draws from the first half's word",
    "../noise.py",
    "jnp.where(is_second, second, first)",
    "first",
    DRAWN,
  ),
  (
    "seed and moment change places",
    "tiles.py",
    "words += [seeds, draws.moments]",
    "words += [draws.moments, seeds]",
    DRAWN,
  ),
)

SM90 = (
  (
    "the producer overwrites a slot that is being read",
    "plgpu.barrier_wait(consumed.at[slot])",
    "pass",
    FEW,
  ),
  (
    "multiplies before the copies have landed",
    "plgpu.barrier_wait(loaded.at[slot])",
    "pass",
    FEW,
  ),
  (
    "waits for one copy of two",
    "loaded=plgpu.Barrier(num_arrivals=2",
    "loaded=plgpu.Barrier(num_arrivals=1",
    FEW,
  ),
  (
    "waits for one reader of two",
    "consumed=plgpu.Barrier(num_arrivals=groups",
    "consumed=plgpu.Barrier(num_arrivals=1",
    MANY,
  ),
  (
    "the last slot of a tile is never freed",
    "        plgpu.barrier_arrive(consumed.at[lax.rem(last, stages)])\n",
    "",
    FEW,
  ),
  (
    "a slot is freed while it is read",
    "consumed.at[lax.rem(position - 1, stages)]",
    "consumed.at[slot]",
    FEW,
  ),
  (
    "both groups read the first one's rows",
    "hidden_s.at[slot, pl.ds(group * rows, rows)]",
    "hidden_s.at[slot, pl.ds(0, rows)]",
    MANY,
  ),
  (
    "the head's tile is one too far",
    "head.at[work.head_tile(work.first_token(cta, tile), step)]",
    "head.at[work.head_tile(work.first_token(cta, tile + 1), step)]",
    FEW,
  ),
  (
    "every step reads the first slice of the hidden states",
    "hidden.at[work.hidden_tile(row_tile, step)]",
    "hidden.at[work.hidden_tile(row_tile, 0)]",
    FEW,
  ),
  (
    "statistics of a group land on the other's rows",
    "mine = pl.ds(row_tile * config.rows + group * rows, rows)",
    "mine = pl.ds(row_tile * config.rows, rows)",
    MANY,
  ),
)

SM100 = (
  (
    "the producer overwrites a slot that is being read",
    "plgpu.barrier_wait(consumed.at[slot])",
    "pass",
    FEW,
  ),
  (
    "multiplies before the copies have landed",
    "plgpu.barrier_wait(loaded.at[slot])",
    "pass",
    FEW,
  ),
  (
    "waits for one copy of two",
    "loaded=plgpu.Barrier(num_arrivals=2",
    "loaded=plgpu.Barrier(num_arrivals=1",
    FEW,
  ),
  (
    "overwrites an accumulator that is being folded",
    "plgpu.barrier_wait(free.at[buffer])",
    "pass",
    STREAM,
  ),
  (
    "folds an accumulator that is not done",
    "plgpu.barrier_wait(done.at[lax.rem(tile, BUFFERS)])",
    "pass",
    FEW,
  ),
  (
    "frees an accumulator before its loads have ended",
    "        plgpu.wait_load_tmem()\n",
    "",
    STREAM,
  ),
  (
    "never frees an accumulator",
    "        plgpu.barrier_arrive(free.at[lax.rem(tile, BUFFERS)])\n",
    "",
    STREAM,
  ),
  (
    "adds to what the accumulator held",
    "accumulate=step > 0",
    "accumulate=True",
    FEW,
  ),
  (
    "both accumulators are the first",
    "start = lax.rem(tile, BUFFERS) * acc_columns + first",
    "start = first + 0 * tile",
    STREAM,
  ),
  (
    "a chunk keeps the ids of the first",
    "first if config.swapped else first + column",
    "first",
    STREAM,
  ),
  (
    "the head's tile is one too far",
    "head.at[work.head_tile(work.first_token(cta, tile), step)]",
    "head.at[work.head_tile(work.first_token(cta, tile + 1), step)]",
    FEW,
  ),
  (
    "every step reads the first slice of the hidden states",
    "hidden.at[work.hidden_tile(row_tile, step)]",
    "hidden.at[work.hidden_tile(row_tile, 0)]",
    FEW,
  ),
)


def mutants(architecture):
  """The kernel's own bugs, and half of those in code that both share."""
  shared = SHARED[KERNELS.index(architecture) :: len(KERNELS)]
  own = {"sm90": SM90, "sm100": SM100}[architecture]
  file = f"kernel_{architecture}.py"
  everything = (*shared, *((n, file, old, new, s) for n, old, new, s in own))
  return [
    Job(
      CHECK,
      dict(architecture=architecture, **shape),
      Mutant(name, f"lm_head_verify/{file}", old, new),
    )
    for name, file, old, new, shape in everything
  ]


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", KERNELS)
def test_planted_bugs_are_noticed(architecture):
  planted = mutants(architecture)
  verdicts = run(planted, 20)
  survivors = [
    job.mutant.name
    for job, verdict in zip(planted, verdicts, strict=True)
    if verdict == SOUND
  ]
  assert not survivors


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", KERNELS)
def test_without_a_bug_the_same_shapes_are_sound(architecture):
  """Else a bug might be noticed for nothing."""
  shapes = (FEW, MANY, DRAWN, TIES, NEGATIVE, STREAM)
  assert run(jobs(architecture, shapes), 60) == [SOUND] * len(shapes)


# --- The reference, and what is refused ---------------------------------------


def operands(rows=5, width=24, vocabulary=263):
  rng = np.random.default_rng(0)
  hidden = rng.normal(size=(rows, width)).astype(np.float32)
  head = rng.normal(size=(vocabulary, width)).astype(np.float32)
  tokens = rng.integers(0, vocabulary, rows).astype(np.int32)
  return hidden, head, tokens


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [263, 256])
def test_the_reference_is_the_definition(vocab_axis, softcap, vocabulary):
  hidden, head, tokens = operands(vocabulary=vocabulary)
  logits = hidden.astype(np.float64) @ head.astype(np.float64).T
  if softcap is not None:
    logits = softcap * np.tanh(logits / softcap)
  given = head if vocab_axis == 0 else head.T
  found = lm_head_verify(
    hidden, given, tokens, vocab_axis=vocab_axis, softcap=softcap
  )
  order = np.sort(logits, axis=1)
  np.testing.assert_array_equal(found.best, logits.argmax(axis=1))
  np.testing.assert_allclose(found.top, order[:, -1], 1e-5)
  np.testing.assert_allclose(
    found.margin, order[:, -1] - order[:, -2], 1e-4, 1e-5
  )
  total = np.log(np.exp(logits).sum(axis=1))
  np.testing.assert_allclose(found.logsumexp, total, 1e-5)
  asked = logits[np.arange(len(tokens)), tokens]
  np.testing.assert_allclose(found.given, asked, 1e-4, 1e-5)
  assert found.sample is None
  unasked = lm_head_verify(hidden, given, vocab_axis=vocab_axis)
  assert unasked.given is None


def test_draws_follow_the_softmax():
  """Chi-squared of 20,000 draws; the same address gives the same draw."""
  _, head, _ = operands(vocabulary=11)
  count = 20_000
  hidden = np.broadcast_to(operands()[0][:1] / 3, (count, 24))
  draws = Draws(
    seeds=jnp.full((count,), 5, jnp.uint32),
    moments=jnp.arange(count, dtype=jnp.int32),
    temperature=0.7,
    stream=3,
  )
  found = lm_head_verify(hidden, head, None, draws)
  logits = hidden[0].astype(np.float64) @ head.astype(np.float64).T / 0.7
  law = np.exp(logits - logits.max())
  expected = law / law.sum() * count
  counts = np.bincount(found.sample, minlength=11)
  assert ((counts - expected) ** 2 / expected).sum() < 10 + 5 * np.sqrt(20)
  again = lm_head_verify(hidden[:7], head, None, _first(draws, 7))
  np.testing.assert_array_equal(again.sample, found.sample[:7])


def _first(draws, count):
  return Draws(
    draws.seeds[:count], draws.moments[:count], draws.temperature, draws.stream
  )


def test_rows_that_share_an_address_share_its_noise():
  hidden, head, _ = operands()
  shared = Draws(
    seeds=jnp.asarray([7, 9], jnp.uint32),
    moments=jnp.asarray([3, 5], jnp.int32),
    temperature=2.0,
    addresses=jnp.asarray([1, 0, 1, 1, 0], jnp.int32),
  )
  own = Draws(
    seeds=jnp.asarray([9, 7, 9, 9, 7], jnp.uint32),
    moments=jnp.asarray([5, 3, 5, 5, 3], jnp.int32),
    temperature=2.0,
  )
  for each in (shared, shared.spread()):
    np.testing.assert_array_equal(
      lm_head_verify(hidden, head, None, each).sample,
      lm_head_verify(hidden, head, None, own).sample,
    )


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(hidden=np.zeros((2, 3, 4), np.float32)), "must have 2 axes"),
    (dict(hidden=np.zeros((5, 25), np.float32)), "differ in width"),
    (dict(hidden=np.zeros((0, 24), np.float32)), "is empty"),
    (dict(head=np.zeros((0, 24), np.float32)), "is empty"),
    (dict(hidden=np.zeros((5, 24), np.int32)), "floating-point"),
    (dict(head=np.zeros((263, 24), np.int8)), "floating-point"),
    (dict(tokens=np.zeros((4,), np.int32)), r"tokens has shape \(4,\)"),
    (dict(vocab_axis=2), "vocab_axis=2"),
    (dict(vocab_axis=1), "differ in width"),
    (dict(softcap=0.0), r"softcap=0\.0"),
    (dict(implementation="sm80"), "'sm80' is unknown"),
  ],
)
def test_what_nobody_can_compute_is_a_value_error(changes, message):
  hidden, head, tokens = operands()
  given = dict(hidden=hidden, head=head, tokens=tokens) | changes
  with pytest.raises(ValueError, match=message):
    lm_head_verify(**given)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(temperature=0.0), r"temperature=0\.0"),
    (dict(seeds=np.zeros((4,), np.uint32)), "draws.seeds has shape"),
    (dict(moments=np.zeros((6,), np.int32)), "draws.moments has shape"),
    (dict(seeds=np.zeros((5,), np.int32)), "use uint32"),
    (dict(addresses=np.zeros((4,), np.int32)), "draws.addresses has shape"),
    (
      dict(addresses=np.zeros((5,), np.int32), seeds=np.zeros((2,), np.uint32)),
      "one number per address",
    ),
  ],
)
def test_impossible_draws_are_a_value_error(changes, message):
  hidden, head, tokens = operands()
  fields = dict(
    seeds=np.zeros((5,), np.uint32),
    moments=np.zeros((5,), np.int32),
    temperature=1.0,
  )
  with pytest.raises(ValueError, match=message):
    lm_head_verify(hidden, head, tokens, Draws(**fields | changes))


@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    ((1024, 128), jnp.float32, "a bfloat16 head"),
    ((1027, 128), jnp.bfloat16, "tiles of 8 x 64"),
    ((1024, 96), jnp.bfloat16, "tiles of 8 x 64"),
    ((1024, 128), jnp.bfloat16, None),
  ],
)
def test_what_kernels_cannot_take_is_said(shape, dtype, message):
  hidden, head = jnp.ones((3, shape[1])), jnp.ones(shape, dtype)
  limit = api._kernel_limit(hidden, head)
  assert limit is None if message is None else message in limit


@pytest.mark.parametrize("architecture", KERNELS)
def test_a_named_kernel_never_falls_back(architecture):
  hidden, head, tokens = operands()
  with pytest.raises(NotImplementedError, match="cannot run on cpu"):
    lm_head_verify(hidden, head, tokens, implementation=architecture)
