"""The k largest, and where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dflash_jax import likeliest
from dflash_jax.likeliest import find_in_groups, find_likeliest


@pytest.mark.parametrize("V, k", [(8191, 16), (5003, 7), (1027, 1), (97, 13)])
def test_groups_find_what_a_sort_finds(monkeypatch, V, k):
  monkeypatch.setattr(likeliest, "MANY", 1)
  scores = jax.random.normal(jax.random.key(V), (3, 5, V))
  wanted = np.argsort(-np.asarray(scores), axis=-1, kind="stable")[..., :k]
  assert np.array_equal(find_in_groups(scores, k), wanted)
  find = jax.jit(find_likeliest, static_argnums=1)
  assert np.array_equal(find(scores, k), wanted)


@pytest.mark.parametrize("values", [1, 2, 5])
def test_of_equals_the_first_come_first(values):
  draws = jax.random.randint(jax.random.key(values), (11, 2003), 0, values)
  scores = draws.astype(jnp.float32)
  wanted = np.argsort(-np.asarray(scores), axis=-1, kind="stable")[:, :16]
  assert np.array_equal(find_in_groups(scores, 16), wanted)


def test_what_is_impossible_is_found_last():
  """Padding is not among the entries, even where most have no chance."""
  scores = jnp.full((2, 1301), -jnp.inf).at[:, 1300].set(0.0)
  found = np.asarray(find_in_groups(scores, 3))
  assert found.tolist() == [[1300, 0, 1]] * 2
