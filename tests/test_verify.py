"""Acceptance of a chain against a token-by-token loop."""

import jax.numpy as jnp
import numpy as np

from dflash_jax.proposal import Proposal
from dflash_jax.verify import match_prefix


def test_accepts_exactly_the_leading_run_of_equal_tokens():
  rng = np.random.default_rng(0)
  proposal = rng.integers(0, 2, size=(211, 5))
  chosen = rng.integers(0, 2, size=(211, 6))
  verdict = match_prefix(Proposal(jnp.asarray(proposal)), jnp.asarray(chosen))
  for row in range(211):
    run = 0
    while run < 5 and proposal[row, run] == chosen[row, run]:
      run += 1
    assert int(verdict.accepted[row]) == run
  np.testing.assert_array_equal(verdict.tokens, chosen)
  assert set(np.asarray(verdict.accepted).tolist()) == set(range(6))


def test_an_empty_proposal_yields_the_targets_own_token():
  empty = Proposal(jnp.zeros((3, 0), jnp.int32))
  verdict = match_prefix(empty, jnp.array([[4], [5], [6]]))
  np.testing.assert_array_equal(verdict.accepted, [0, 0, 0])
