"""EAGLE-3 against speculators' own, from golden files, and in the loop."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dflash_jax import model as model_lib
from dflash_jax import weights
from dflash_jax.config import (
  Config,
  ConfigError,
  DecodeConfig,
  DraftConfig,
  TargetSource,
)
from dflash_jax.drafters import Eagle3
from dflash_jax.features import choose_eagle3_taps
from dflash_jax.networks import Eagle3Config
from dflash_jax.proposal import Drafting
from dflash_jax.sampling import GREEDY, Sampling, weigh
from dflash_jax.width import Goodput, Threshold
from tests.drafters.baselines import (
  CHAIN,
  DRAFTS,
  DRAWN,
  LAW,
  TREE,
  VOCAB,
  Script,
  check_rows_alone,
  decoder_of,
  model_with,
  plain_talk,
  questions,
  rehearse,
  sharpen,
  talk,
  worst_confidence,
  worst_law,
)
from tests.test_decode import TINY, chi_squared, count_replies, joint_law
from tests.testing import random_params, tiny_model, tiny_target_config

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "eagle3"
CASES = sorted(path.name for path in GOLDENS.iterdir())
TOLERANCE = 1e-4
WIDTH = 24  # of the target
TAPS = (0, 1)
CONFIG = Eagle3Config(
  width=22,
  mlp_width=34,
  num_heads=6,
  num_kv_heads=2,
  head_width=10,
  vocab_size=VOCAB,
  draft_vocab_size=11,
  target_layer_ids=TAPS,
  target_width=WIDTH,
  own_embedding=True,
)
HEAD_IDS = np.array([0, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12])  # neither 1 nor 8
DRAWN_CHAIN = dataclasses.replace(CHAIN, sampling=DRAWN)


# --- The formulas -------------------------------------------------------------


def unroll(drafter, params, texts, taps, steps):
  """f32[steps, N, L, V'], logits of all steps of chains from all rows."""
  N, L = texts.shape
  places = jnp.broadcast_to(jnp.arange(L), (N, L))
  mask = jnp.tril(jnp.ones((N, L, L), bool))
  text = drafter.begin_chains(params, texts, taps, places, mask)
  ahead = [jnp.roll(texts, -1 - step, axis=1) for step in range(steps)]
  outputs = drafter.continue_chains(
    params, text, jnp.stack(ahead, axis=-1), places, mask
  )
  return jnp.stack([drafter.logits(params, hidden) for hidden in outputs])


class Golden:
  """A drafter, and what speculators made of a text with it."""

  def __init__(self, case: str):
    self.directory = GOLDENS / case
    arrays = load_file(self.directory / "golden.safetensors")
    self.config, params = weights.load_eagle3(self.directory)
    self.params = {"embedding": jnp.asarray(arrays["embedding"]), **params}
    self.tokens = arrays["tokens"][None]
    self.taps = arrays["taps"][None]
    self.logits = arrays["logits"]

  def worst(self, drafter: Eagle3) -> float:
    """Farthest that any logit of any step lies from the truth."""
    steps, T, _ = self.logits.shape
    outputs = unroll(drafter, self.params, self.tokens, self.taps, steps)
    errors = []
    for step, logits in enumerate(outputs):
      known = T - 1 - step  # later rows pair tokens past the end
      logits = logits[0, :known]
      errors.append(np.abs(logits - self.logits[step, :known]).max())
    return max(errors)


@pytest.fixture(params=CASES, scope="module")
def golden(request):
  """Each golden case in turn."""
  return Golden(request.param)


def test_unrolled_steps_are_those_of_speculators(golden):
  assert golden.worst(Eagle3(golden.config, 3)) < TOLERANCE


class Unshifted(Eagle3):
  """Pairs each state with its own token, not with the next."""

  def _embed(self, params, tokens):
    return super()._embed(params, jnp.roll(tokens, 1, axis=1))


class Still(Eagle3):
  """Later steps stand where the first did."""

  def _angles(self, positions):
    first = jnp.broadcast_to(jnp.arange(positions.shape[1]), positions.shape)
    return super()._angles(first)


class OtherResidual(Eagle3):
  """Adds to the hidden state where its norm is meant, or the reverse."""

  def __init__(self, config, max_drafts):
    normed = not config.norm_before_residual
    other = dataclasses.replace(config, norm_before_residual=normed)
    super().__init__(other, max_drafts)


@pytest.mark.parametrize("planted", [Unshifted, Still, OtherResidual])
def test_a_planted_error_in_the_formulas_is_caught(golden, planted):
  assert golden.worst(planted(golden.config, 3)) > 100 * TOLERANCE


def test_taps_are_those_that_engines_choose():
  """Layers 2, n // 2 and n - 3 are entered; ids name the layers left."""
  assert choose_eagle3_taps(32) == (1, 15, 28)
  assert choose_eagle3_taps(7) == (1, 2, 3)
  with pytest.raises(ConfigError, match="6 layers is too shallow"):
    choose_eagle3_taps(6)


# --- What it knows ------------------------------------------------------------


@functools.cache
def eagle(kind: type[Eagle3] = Eagle3, config: Eagle3Config = CONFIG):
  """A random drafter with a reduced head, and its parameters."""
  drafter = kind(config, DRAFTS)
  params = sharpen(random_params(drafter, 5))
  return drafter, {**params, "head_ids": jnp.asarray(HEAD_IDS, jnp.int32)}


def true_laws(script, offers, sampling):
  """f64[N, V'] of each drafted node, with nothing cached."""
  _, texts, rows, lengths, depths = questions(script, offers)
  past = texts.shape[1] - script.taps.shape[1]
  taps = np.pad(script.taps, ((0, 0), (0, past), (0, 0)))[rows]
  run = jax.jit(unroll, static_argnums=(0, 4))
  logits = run(*eagle(), texts, taps, DRAFTS)
  last = logits[depths - 1, np.arange(len(texts)), lengths - 1]
  laws = np.asarray(weigh(last, sampling), np.float64)
  return laws / laws.sum(-1, keepdims=True)


def error(kind, drafting) -> float:
  """Farthest from the truth, over nodes, rounds and rows."""
  script = Script.write(2, len(TAPS) * WIDTH)
  asked, _ = eagle(kind if "_step" in vars(kind) else Eagle3)
  keeper, params = eagle(kind)
  offers = rehearse(asked, params, script, drafting, keeper=keeper)
  if drafting.is_certain:
    laws = true_laws(script, offers, Sampling(temperature=1.0))
    columns = {token: column for column, token in enumerate(HEAD_IDS)}
    return worst_confidence(script, offers, laws, columns)
  return worst_law(script, offers, true_laws(script, offers, drafting.sampling))


@pytest.mark.parametrize(
  "drafting",
  [pytest.param(CHAIN, marks=pytest.mark.slow), TREE, DRAWN_CHAIN],
  ids=["chain", "tree", "drawn"],
)
def test_every_node_is_as_likely_as_from_scratch(drafting):
  """A chain's logits and a tree's are those of chains unrolled alone."""
  assert error(Eagle3, drafting) < 1e-5


class NoShift(Eagle3):
  """Pairs committed tokens with their own states."""

  def absorb(self, params, state, taps, tokens, count):
    shifted = jnp.roll(tokens, 1, axis=1)
    return super().absorb(params, state, taps, shifted, count)


class Stale(Eagle3):
  """Keeps the rows of rejected drafts."""

  def absorb(self, params, state, taps, tokens, count):
    after = super().absorb(params, state, taps, tokens, count)
    wrong = super().absorb(
      params, state, taps, tokens, jnp.where(count > 0, tokens.shape[1], 0)
    )
    return dataclasses.replace(after, cache=wrong.cache)


class LastState(Eagle3):
  """Keeps the state of the last token read, accepted or not."""

  def absorb(self, params, state, taps, tokens, count):
    after = super().absorb(params, state, taps, tokens, count)
    wrong = self.fuse(params, taps[:, -1])
    return dataclasses.replace(after, waiting=wrong)


class FirstPair(Eagle3):
  """Counts a pair for a row's first token, which has none."""

  def absorb(self, params, state, taps, tokens, count):
    begun = jnp.ones_like(state.begun)
    state = dataclasses.replace(state, begun=begun)
    return super().absorb(params, state, taps, tokens, count)


class Orphans(Eagle3):
  """Nodes take the first node above for their parent."""

  def _step(self, params, cache, above, tokens, parents, depth):
    parents = jnp.zeros_like(parents)
    return super()._step(params, cache, above, tokens, parents, depth)


class Featureless(Eagle3):
  """Every step pairs its token with the waiting state."""

  def _step(self, params, cache, above, tokens, parents, depth):
    nodes, outputs = above
    after, logits = super()._step(
      params, cache, (nodes, outputs), tokens, parents, depth
    )
    kept = jnp.broadcast_to(outputs[:, :1], after[1].shape)
    return (after[0], kept), logits


@pytest.mark.parametrize(
  ("planted", "drafting"),
  [
    (NoShift, CHAIN),
    (Stale, CHAIN),
    (LastState, CHAIN),
    (FirstPair, CHAIN),
    (Orphans, TREE),
    (Featureless, CHAIN),
  ],
  ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_error_is_caught(planted, drafting):
  assert error(planted, drafting) > 1e-2


# --- In the decode loop -------------------------------------------------------


@pytest.mark.parametrize(
  ("drafting", "sampling"),
  [
    (dataclasses.replace(TREE, sampling=DRAWN, is_coupled=True), LAW),
    pytest.param(CHAIN, GREEDY, marks=pytest.mark.slow),
    pytest.param(TREE, GREEDY, marks=pytest.mark.slow),
    pytest.param(
      dataclasses.replace(DRAWN_CHAIN, is_coupled=True),
      LAW,
      marks=pytest.mark.slow,
    ),
  ],
  ids=["coupled tree", "greedy chain", "greedy tree", "coupled chain"],
)
def test_replies_are_those_of_plain_decoding(drafting, sampling):
  """Over two turns."""
  model = model_with(*eagle())
  decoder = decoder_of(model, drafting, sampling)
  assert talk(model, decoder) == plain_talk(sampling)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Threshold(0.3), Goodput()])
def test_widths_that_rest_keep_the_tokens(policy):
  """What a burst read is absorbed at once."""
  model = model_with(*eagle())
  decoder = decoder_of(model, CHAIN, policy=policy)
  assert talk(model, decoder) == plain_talk(GREEDY)


def test_rows_alone_reply_as_in_company_and_compile_once():
  """With the target's embedding and a whole head."""
  config = dataclasses.replace(
    CONFIG, width=WIDTH, own_embedding=False, draft_vocab_size=VOCAB
  )
  drafter = Eagle3(config, DRAFTS)
  own = random_params(drafter, 1)
  assert "embedding" not in own and "head_ids" not in own
  borrowed = model_with(drafter, own).params.borrowed
  check_rows_alone(drafter, drafter.bind(own, borrowed))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["token", "block"])
def test_replies_follow_the_targets_law(rule):
  """3e4 replies of the whole loop, with a head that lacks a token."""
  model = tiny_model(
    drafter=False, target=tiny_target_config(TINY, num_layers=2)
  )
  config = dataclasses.replace(CONFIG, vocab_size=TINY, draft_vocab_size=4)
  drafter = Eagle3(config, 2)
  params = random_params(drafter, 3) | {"head_ids": jnp.array([0, 1, 3, 4])}
  model = dataclasses.replace(
    model,
    drafter=drafter,
    params=dataclasses.replace(model.params, drafter=params),
  )
  decoder = decoder_of(model, Drafting(2, sampling=DRAWN), LAW, rule)
  counts = count_replies(model, decoder, [2, 0, 3], passes=8)
  assert chi_squared(counts, joint_law(model, [2, 0, 3], LAW)) < 5


# --- Files --------------------------------------------------------------------


def test_both_layouts_are_read():
  nested, flat = Golden("speculators_reduced"), Golden("flat")
  assert nested.config.norm_before_residual and nested.config.own_embedding
  assert not flat.config.norm_before_residual
  assert not flat.config.own_embedding
  for case in (nested, flat):
    assert weights.drafter_kind(str(case.directory)) == "eagle3"
    assert case.config.target_layer_ids == (1, 3, 5)
    stored = load_file(case.directory / "model.safetensors")
    ids = case.params["head_ids"]
    np.testing.assert_array_equal(np.flatnonzero(stored["t2d"]), ids)


def test_a_saved_drafter_is_the_same(golden, tmp_path):
  params = dict(golden.params)
  weights.save_eagle3(
    tmp_path / "saved", golden.config, params, dtype="float32"
  )
  config, loaded = weights.load_eagle3(tmp_path / "saved")
  assert config == golden.config
  if not config.own_embedding:
    del params["embedding"]
  assert loaded.keys() == params.keys()
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  if golden.directory.name == "flat":  # the release's own layout, byte for byte
    stored = load_file(golden.directory / "model.safetensors")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert stored.keys() == written.keys()
    for name, tensor in stored.items():
      assert tensor.dtype == written[name].dtype
      np.testing.assert_array_equal(tensor, written[name])


def spoil(directory, **fields):
  path = directory / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def spoil_map(directory, **tensors):
  path = directory / "model.safetensors"
  stored = {**load_file(path), **tensors}
  save_file({k: v for k, v in stored.items() if v is not None}, path)


FAULTS = {
  "norm_before_fc=True is not supported": {"norm_before_fc": True},
  "norm_output=True is not supported": {"norm_output": True},
  "num_hidden_layers=2 is not supported": {"num_hidden_layers": 2},
  "ids from 1": {
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 4, 6]}
  },
  "expected a matrix for 5 taps": {
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4, 5]}
  },
  "layer_ids is missing": {"eagle_config": {}},
  "lm_head.weight has shape": {"draft_vocab_size": 30},
}


@pytest.mark.parametrize("complaint", FAULTS)
def test_what_is_not_supported_is_refused(complaint, tmp_path):
  directory = tmp_path / "flat"
  shutil.copytree(GOLDENS / "flat", directory)
  spoil(directory, **FAULTS[complaint])
  with pytest.raises(weights.WeightsError, match=complaint):
    weights.load_eagle3(directory)


@pytest.mark.parametrize(
  ("tensors", "complaint"),
  [
    ({"d2t": None}, "d2t is missing"),
    ({"d2t": np.full(29, 25)}, "d2t leads to ids 25..53"),
    ({"d2t": -np.arange(29)}, "d2t leads to ids 0..0"),
    ({"d2t": np.zeros(29, np.int64)}, "name different tokens"),
    ({"d2t": np.zeros(28, np.int64)}, r"d2t is int64\[28\]"),
  ],
)
def test_a_damaged_map_is_named(tensors, complaint, tmp_path):
  directory = tmp_path / "flat"
  shutil.copytree(GOLDENS / "flat", directory)
  spoil_map(directory, **tensors)
  with pytest.raises(weights.WeightsError, match=complaint):
    weights.load_eagle3(directory)


def test_config_names_it_by_its_directory(tmp_path):
  target = tiny_target_config(263)
  config = dataclasses.replace(
    CONFIG, vocab_size=263, width=WIDTH, own_embedding=False
  )
  params = random_params(Eagle3(config, 1), 0)
  weights.save_eagle3(tmp_path / "eagle", config, params, dtype="float32")
  run = Config(
    target=TargetSource(random=target),
    drafter=DraftConfig(path=str(tmp_path / "eagle"), block_size=6),
    decode=DecodeConfig(block_size=3),
  )
  model = model_lib.load(run)
  assert model.drafter.taps == TAPS
  assert model.decoder().drafter.max_drafts == 2
  embedding = model.params.drafter["embedding"]
  assert embedding is model.params.target["embedding"]
  run.target.random = dataclasses.replace(target, num_layers=1)
  with pytest.raises(ConfigError, match=r"tap 1 is outside .* 0\.\.\.0"):
    model_lib.load(run)
