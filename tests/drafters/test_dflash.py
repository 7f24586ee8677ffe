"""The DFlash drafter against the released package, from golden files."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dflash_jax import weights
from dflash_jax.config import DrafterConfig
from dflash_jax.decode import Decoder
from dflash_jax.decode_state import ModelParams
from dflash_jax.drafters import DFlash
from dflash_jax.features import choose_taps
from dflash_jax.model import borrow
from dflash_jax.proposal import Drafting
from dflash_jax.target import Target

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "drafter"
CASES = sorted(p.parent.name for p in GOLDENS.glob("*/golden.json"))
TOLERANCE = 2e-4


class Case:
  """A golden drafter, its target and its truth."""

  def __init__(self, name: str, drafter: pathlib.Path | None = None):
    directory = GOLDENS / name
    self.golden = json.loads((directory / "golden.json").read_text())
    self.arrays = load_file(directory / "golden.safetensors")
    target_config, target_params = weights.load_target(
      str(directory / self.golden["target"]), "float32"
    )
    config, params, _ = weights.load_drafter(
      str(drafter or directory / self.golden["drafter"]), "float32"
    )
    config.check_target(target_config)
    self.target, self.drafter = Target(target_config), DFlash(config)
    self.params = ModelParams(
      target_params, params, borrow(target_params, None)
    )

  def decode(self, settings) -> tuple[list[int], list[int]]:
    """New tokens and tokens emitted per round, by this project's loop."""
    prompt = np.array([settings["prompt"]], np.int32)
    budget = settings["max_new_tokens"]
    decoder = Decoder(
      self.target,
      self.drafter,
      Drafting(self.drafter.max_drafts),
      stop_ids=tuple(settings["stop_token_ids"] or ()),
      rounds_per_dispatch=1,
    )
    capacity = prompt.size + budget + decoder.slack(prompt.size)
    state = decoder.init_state(1, capacity, budget)
    state = decoder.begin(state, np.array([budget]), np.zeros(1))
    state = decoder.prefill(
      self.params, state, prompt, np.array([prompt.size]), np.array([True])
    )
    emitted = []
    while not bool(state.done.all()):
      before = int(state.count[0])
      state = decoder.run_rounds(self.params, state)
      emitted.append(int(state.count[0]) - before)
    return state.tokens[0, : int(state.count[0])].tolist(), emitted


@pytest.fixture(params=CASES, scope="module")
def case(request):
  """Each golden case in turn."""
  return Case(request.param)


def test_whole_decode_matches_tokens_and_length_of_every_round(case):
  tokens, emitted = case.decode(case.golden)
  assert tokens == case.golden["new_tokens"]
  assert emitted == case.golden["acceptance_lengths"]


def test_first_block_matches_hidden_states_and_logits(case):
  check_round(case, "first", context="first", absorbed=0)


def test_later_block_sees_the_context_of_earlier_rounds(case):
  first = case.arrays.get("second.target_hidden")
  if first is None:
    assert len(case.golden["rounds"]) < 2
    return
  check_round(case, "second", context="second", absorbed=1)


def check_round(case, name, context, absorbed):
  """Absorbs rounds' taps, drafts one block, compares with the package."""
  arrays, drafter = case.arrays, case.drafter
  state = drafter.init_state(1, 97, "float32")
  parts = ["first", "second"][: absorbed + 1]
  for part in parts:
    taps = jnp.asarray(arrays[f"{part}.target_hidden"])[None]
    _, T, _ = taps.shape
    np.testing.assert_allclose(
      drafter.context_features(case.params.drafter, taps)[0],
      arrays[f"{part}.context"],
      atol=TOLERANCE,
    )
    tokens = jnp.zeros((1, T), jnp.int32)
    state = jax.jit(DFlash.absorb, static_argnums=0)(
      drafter, case.params.drafter, state, taps, tokens, jnp.array([T])
    )
  block = arrays[f"{name}.block"]
  hidden = jax.jit(DFlash.draft, static_argnums=0)(
    drafter,
    case.params.drafter,
    state,
    jnp.array([block[0]]),
    case.params.borrowed.embedding,
    size=jnp.array([len(block)]),
  )[0, : len(block)]
  np.testing.assert_allclose(
    hidden, arrays[f"{name}.draft_hidden"], atol=TOLERANCE
  )
  np.testing.assert_allclose(
    drafter.logits(hidden[1:], case.params.borrowed.head),
    arrays[f"{name}.draft_logits"],
    atol=TOLERANCE,
  )
  stats = drafter.read_head(hidden[None, 1:], case.params.borrowed.head)
  logits = np.asarray(arrays[f"{name}.draft_logits"])
  np.testing.assert_array_equal(stats.best[0], logits.argmax(-1))
  np.testing.assert_allclose(stats.top[0], logits.max(-1), atol=TOLERANCE)


def qwen3_8b_drafter() -> DrafterConfig:
  """The published configuration for Qwen3-8B (training.md 1.1)."""
  return DrafterConfig(
    num_layers=5,
    width=4096,
    mlp_width=12288,
    num_heads=32,
    num_kv_heads=8,
    head_width=128,
    vocab_size=151936,
    block_size=16,
    mask_token_id=151669,
    target_layer_ids=choose_taps(36, 5),
    num_target_layers=36,
    target_width=4096,
    rotary_base=1e6,
    max_length=40960,
  )


def test_published_qwen3_8b_drafter_has_the_published_parameter_count():
  assert DFlash(qwen3_8b_drafter()).count_parameters() == 1_048_626_432


def test_random_parameters_have_the_shapes_of_loaded_ones(case):
  drawn = jax.eval_shape(case.drafter.init, jax.random.key(0))
  loaded = jax.tree.map(lambda x: x.shape, case.params.drafter)
  assert jax.tree.map(lambda x: x.shape, drawn) == loaded
