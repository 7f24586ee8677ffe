"""Drafters in the speculators layout against the package's own forward."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dflash_jax import weights
from dflash_jax.drafters import DFlash, Eagle3
from dflash_jax.model import borrow
from tests.drafters.test_correctors import follow
from tests.drafters.test_eagle3 import unroll

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "speculators"
CASES = sorted(
  path.name
  for path in GOLDENS.iterdir()
  if path.name not in ("verifier", "eagle3")
)
ANCHORS = (6, 13)
TOLERANCE = 2e-5


class Case:
  """A golden drafter between its target's tables, and its truth."""

  def __init__(self, name: str, directory: pathlib.Path | None = None):
    self.arrays = load_file(GOLDENS / name / "golden.safetensors")
    target_config, target_params = weights.load_target(
      str(GOLDENS / "verifier")
    )
    place = directory or GOLDENS / name
    config, self.params, ids = weights.load_drafter(place)
    config.check_target(target_config)
    self.drafter = DFlash(config)
    self.borrowed = borrow(target_params, ids)
    # Of slots, those that predict; the token before the first is the anchor.
    self.first = 0 if config.anchor_predicts else 1

  def tokens(self, block: int) -> np.ndarray:
    """i32[K + 1], the text from an anchor on."""
    K = self.drafter.config.block_size
    start = ANCHORS[block]
    return self.arrays["tokens"][start : start + K + 1]

  def hidden(self, block: int) -> jax.Array:
    """f32[K, D], the slots of a block at an anchor."""
    anchor, K = ANCHORS[block], self.drafter.config.block_size
    longest = max(ANCHORS)  # one shape for all
    state = jax.jit(DFlash.absorb, static_argnums=0)(
      self.drafter,
      self.params,
      self.drafter.init_state(1, 41, "float32"),
      jnp.asarray(self.arrays["taps"][None, :longest]),
      jnp.zeros((1, longest), jnp.int32),
      jnp.array([anchor]),
    )
    return jax.jit(DFlash.draft, static_argnums=0)(
      self.drafter,
      self.params,
      state,
      jnp.asarray(self.tokens(block)[:1]),
      self.borrowed.embedding,
      size=jnp.array([K]),
    )[0, :K]

  def corrected(self, block: int) -> np.ndarray:
    """f32[D, V'], logits of the slots that predict, along the text."""
    slots = jnp.asarray(self.arrays["hidden"][block, self.first :])
    logits = jnp.asarray(self.arrays["logits"][block, self.first :])
    before = self.tokens(block)[: len(slots)]
    embedding = self.borrowed.embedding
    return np.asarray(
      follow(self.drafter, self.params, slots, logits, before, embedding)
    )

  def worst(self) -> float:
    """Farthest that anything lies from the truth."""
    errors = []
    for block in range(len(ANCHORS)):
      hidden = self.hidden(block)
      logits = self.drafter.logits(hidden, self.borrowed.head)
      pairs = [(hidden, "hidden"), (logits, "logits")]
      if "corrected" in self.arrays:
        pairs.append((self.corrected(block), "corrected"))
        pairs.append((self.confidence(block), "confidence"))
      if "scores" in self.arrays:
        chosen = self.arrays["candidates"][block, self.first :]
        scores = np.take_along_axis(self.corrected(block), chosen, axis=1)
        pairs.append((scores, "scores"))
      for found, name in pairs:
        truth = self.arrays[name][block][-len(found) :]
        errors.append(np.abs(np.asarray(found) - truth).max())
    return max(errors)

  def confidence(self, block: int) -> jax.Array:
    """f32[D], logits of acceptance of the slots that predict."""
    slots = jnp.asarray(self.arrays["hidden"][block, self.first :])
    head = self.params["confidence"]["projection"]
    before = self.tokens(block)[: len(slots)]
    if self.drafter.config.confidence.sees_token:
      rows = self.params["corrector"]["before"][before]
      slots = jnp.concatenate([slots, rows], axis=1)
    return (slots @ head["kernel"] + head["bias"])[:, 0]


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_those_of_the_package(name):
  assert Case(name).worst() < TOLERANCE


def test_a_selector_keeps_the_packages_candidates():
  case = Case("dflash2")
  for block in range(len(ANCHORS)):
    kept = np.isfinite(case.corrected(block))
    chosen = case.arrays["candidates"][block, case.first :]
    assert np.take_along_axis(kept, chosen, axis=1).all()
    assert kept.sum() == chosen.size


def test_chains_of_eagle3_are_those_of_the_package():
  directory = GOLDENS / "eagle3"
  arrays = load_file(directory / "golden.safetensors")
  config, params = weights.load_eagle3(directory)
  steps, T, _ = arrays["logits"].shape
  texts, taps = arrays["tokens"][None], arrays["taps"][None]
  found = unroll(Eagle3(config, 3), params, texts, taps, steps)
  for step in range(steps):
    known = T - 1 - step  # later rows pair tokens past the end
    np.testing.assert_allclose(
      found[step, 0, :known], arrays["logits"][step, :known], atol=TOLERANCE
    )
