"""Where taps are placed."""

import pytest

from dflash_jax.config import ConfigError
from dflash_jax.features import choose_taps


@pytest.mark.parametrize(
  ("layers", "count", "taps"),
  [
    (36, 5, (1, 9, 17, 25, 33)),  # Qwen3-4B and 8B
    (64, 5, (1, 16, 31, 46, 61)),  # Qwen3.6-27B
    (60, 6, (1, 12, 23, 35, 46, 57)),  # gemma-4-31B
    (30, 5, (1, 8, 14, 20, 27)),  # SmolLM2-135M: halves round to even
    (36, 1, (18,)),
  ],
)
def test_taps_stand_where_published_checkpoints_have_them(layers, count, taps):
  assert choose_taps(layers, count) == taps


def test_a_target_too_shallow_for_that_many_taps_is_refused():
  with pytest.raises(ConfigError, match="num_taps=3.*5 layers.*at most 2"):
    choose_taps(5, 3)
