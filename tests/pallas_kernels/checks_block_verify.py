"""block_verify: interpreted kernels against the passes in plain XLA."""

import jax.numpy as jnp
import numpy as np

from tests.pallas_kernels.checks import INTERPRETED

STREAMS = dict(accept=2, recovery=3, bonus=4)
TEMPERATURE = 0.8


def block_verify(
  batch: int,
  drafted: int,
  vocabulary: int,
  *,
  rule: str = "block",
  same: bool = False,
  given: str = "logits",
  sizes: tuple[int, int, int] | None = None,
) -> None:
  """Compares every pass, the last one for sequences that end 0, 1, ... P deep.

  Args:
    batch, drafted, vocabulary: B, P, V.
    rule: of the verdict.
    same: the drafter's law is the target's, which scaled down leaves nothing to
      recover from.
    given: "logits"; "probabilities", a third of them 0, of both laws; "draft"
      for the drafter's alone; "holes" for logits, a third of them -inf.
    sizes: of the chunks of the three passes.
  """
  from pallas_kernels.block_verify import api
  from pallas_kernels.block_verify import rule as rules
  from pallas_kernels.block_verify.config import Config, choose_config
  from pallas_kernels.block_verify.kernel import KernelPasses
  from pallas_kernels.block_verify.reference import XlaPasses

  rng = np.random.default_rng(batch + drafted + vocabulary)
  target_logits = 2 * rng.normal(size=(batch, drafted + 1, vocabulary))
  draft_logits = target_logits[:, :-1]
  if not same:
    draft_logits = draft_logits + rng.normal(size=draft_logits.shape)
  laws, temperatures = [target_logits, draft_logits], [TEMPERATURE, 1.1]
  if given in ("holes", "probabilities"):
    for law in laws:
      law[rng.random(law.shape) < 1 / 3] = -np.inf
      law[..., vocabulary // 2 :][..., :512] = -np.inf  # a whole chunk
  if same:
    temperatures[1] = TEMPERATURE
  drafts = (laws[1] + rng.gumbel(size=draft_logits.shape)).argmax(-1)
  for index in {"draft": (1,), "probabilities": (0, 1)}.get(given, ()):
    law = np.exp(laws[index] / temperatures[index])
    laws[index] = law / law.sum(axis=-1, keepdims=True)
    temperatures[index] = None
  settings = rules.Rule(rule, *temperatures, rules.Streams(**STREAMS))
  logits = [jnp.array(x, jnp.float32) for x in laws]
  seeds = jnp.array(rng.integers(0, 2**32, batch, np.uint32))
  moments = jnp.array(rng.integers(0, 9999, batch), jnp.int32)
  config = Config(*sizes) if sizes else choose_config(vocabulary)
  want = XlaPasses(settings, *logits, seeds, moments)
  got = KernelPasses(settings, config, *logits, seeds, moments, INTERPRETED)

  target, draft = want.measure()
  for ours, theirs in zip(got.measure(), (target, draft), strict=True):
    np.testing.assert_array_equal(ours.top, theirs.top)
    np.testing.assert_allclose(ours.share, theirs.share, 3e-6)
  weights = jnp.array(rng.uniform(0.1, 1, (batch, drafted)), jnp.float32)
  if drafted > 1:
    passes = weights[:, 1:], target, draft
    excess = got.excess(*passes)
    np.testing.assert_allclose(excess, want.excess(*passes), 3e-6, 1e-6)
  ends = jnp.arange(batch, dtype=jnp.int32) % (drafted + 1)
  ending = rules.end(settings, ends, weights[:, 0], target, draft)
  np.testing.assert_array_equal(got.race(ending), want.race(ending))
  arguments = *logits, jnp.array(drafts, jnp.int32), seeds, moments
  found = api.run_kernel(
    settings, *arguments, config=config, interpret=INTERPRETED
  )
  for ours, theirs in zip(
    found, rules.verify(settings, want, *arguments), strict=True
  ):
    np.testing.assert_array_equal(ours, theirs)
