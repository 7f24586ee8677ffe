"""block_verify: interpreted kernels against plain XLA, and planted bugs."""

import pytest

from tests.pallas_kernels.interpreter import SOUND, Job, Mutant, run

CHECK = "tests.pallas_kernels.checks_block_verify:block_verify"
SMALL = dict(batch=3, drafted=2, vocabulary=1100, sizes=(512, 1024, 512))
EMPTY = dict(batch=2, drafted=1, vocabulary=1028, same=True)
GIVEN = SMALL | dict(given="probabilities")
# One draft and one chunk; last chunks of 4 to all tokens of their own; the
# default chunks; more rows than a chunk has; an empty residual; zeros in laws.
SHAPES = (
  dict(batch=1, drafted=1, vocabulary=512),
  dict(batch=2, drafted=1, vocabulary=1532, rule="token"),
  dict(batch=1, drafted=3, vocabulary=1536, sizes=(512, 512, 512)),
  dict(batch=1, drafted=2, vocabulary=4108),
  EMPTY,
  dict(batch=1, drafted=7, vocabulary=516),
  GIVEN,
  SMALL | dict(given="draft", rule="token"),
  SMALL | dict(given="holes", vocabulary=1532, sizes=(512, 512, 512)),
)


def planted(name, old, new, arguments=None) -> Mutant:
  return Mutant(name, "block_verify/kernel.py", old, new, arguments or SMALL)


MUTANTS = (
  planted(
    "a moved chunk counts what others count",
    "own = self.ids() >= self.begin",
    "own = self.ids() >= self.first",
  ),
  planted(
    "a moved chunk drops its first token",
    "own = self.ids() >= self.begin",
    "own = self.ids() > self.begin",
  ),
  planted(
    "the last chunk reads past the row",
    "lax.min(begin, jnp.int32(vocabulary - size))",
    "begin",
  ),
  planted(
    "every sequence has the sums of the first",
    "chunk.load(rows.at[sequence, row])",
    "chunk.load(rows.at[sequence * 0, row])",
  ),
  planted(
    "drafts at the target's temperature",
    "self._measure(self.draft, self.rule.draft_temperature)",
    "self._measure(self.draft, self.rule.temperature)",
  ),
  planted(
    "probabilities taken for logits",
    "return values\n",
    "return jnp.exp2((values - top) * _rate(1.0))\n",
    GIVEN,
  ),
  planted(
    "a residual of drafts at the target's temperature",
    "_power(draft, numbers.draft_top, self.rule.draft_temperature)",
    "_power(draft, numbers.draft_top, self.rule.temperature)",
  ),
  planted(
    "chunks overwrite each other",
    "tops[sequence, row, split] = top",
    "tops[sequence, row, 0] = top",
  ),
  planted(
    "sums merged without their maxima",
    "1.0 / (totals * shares)",
    "1.0 / (totals + 0 * shares)",
  ),
  planted(
    "excess of the row before",
    "target.at[sequence, row + 1]",
    "target.at[sequence, row]",
  ),
  planted(
    "excess weighs the wrong rows",
    "Softmax(*(x[:, 1:] for x in draft)),",
    "Softmax(*(x[:, :-1] for x in draft)),",
  ),
  planted(
    "a residual without the drafter's law",
    "p - q * numbers.draft_share",
    "p - 0 * q * numbers.draft_share",
  ),
  planted(
    "winners are counted from their chunk",
    "return offsets + self.first",
    "return offsets",
  ),
  planted("one stream for all", "stream=stream,", "stream=3,"),
  planted(
    "seed and moment change places",
    "spread(seed), spread(moment)",
    "spread(moment), spread(seed)",
  ),
  planted(
    "noise of another vocabulary",
    "stream=stream, vocabulary=V",
    "stream=stream, vocabulary=V + 1",
  ),
  planted(
    "the first chunk wins every race",
    "wins = scores == best[..., None]",
    "wins = scores == scores[..., :1]",
  ),
  planted(
    "nothing when the residual is empty",
    "jnp.where(best[0] > 0, left, own)",
    "jnp.where(best[1] > 0, left, own)",
    EMPTY,
  ),
  planted(
    "the target's own law even when there is a residual",
    "jnp.where(best[0] > 0, left, own)",
    "own",
  ),
)


def test_interpreted_kernels_find_what_plain_xla_finds():
  assert run([Job(CHECK, SMALL)], timeout=300) == [SOUND]


@pytest.mark.kernels
def test_interpreted_kernels_at_every_shape():
  jobs = [Job(CHECK, shape) for shape in SHAPES]
  assert run(jobs, timeout=300) == [SOUND] * len(jobs)


@pytest.mark.kernels
def test_planted_bugs_are_found():
  jobs = [Job(CHECK, m.arguments, m) for m in MUTANTS]
  verdicts = run(jobs, timeout=120)
  missed = [
    m.name for m, v in zip(MUTANTS, verdicts, strict=True) if v == SOUND
  ]
  assert not missed
