"""What all tests share."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def programs():
  """Frees what a file compiled.

  The programs of all files together, thousands in one process, run it out of
  memory maps, and then the compiler aborts.
  """
  yield
  jax.clear_caches()
