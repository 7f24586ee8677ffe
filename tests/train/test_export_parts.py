"""Runs of drafters with parts: checkpoints restored, exported, loaded back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny import get_config
from dflash_jax import weights
from dflash_jax.config import DecodeConfig, DraftConfig
from dflash_jax.drafters import DFlash
from dflash_jax.generate import generate
from dflash_jax.model import load
from tests.testing import (
  VARIANTS,
  tiny_drafter_config,
  tiny_target_config,
)
from train.checkpoint import Checkpoints
from train.design import Trainable, design_drafter, make_drafter
from train.export import export
from train.record import Run, write_run
from train.step import TrainState

IDS = (0, 3, 4, 17, 60)


def random_state(drafter: Trainable, columns, averaged: bool) -> TrainState:
  rng = np.random.default_rng(7)

  def draw():
    return jax.tree.map(
      lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
      drafter.init(jax.random.key(0), columns=columns),
    )

  params = draw()
  scale = None
  if drafter.taps:
    width = params["context_projection"]["kernel"].shape[0]
    scale = jnp.asarray(rng.uniform(0.5, 2, width), jnp.float32)
  return TrainState(
    step=jnp.int32(3),
    params=params,
    optimizer={"count": jnp.int32(3)},
    tap_scale=scale,
    average=draw() if averaged else None,
  )


def make_run(directory, parts, ids, averaged=False) -> TrainState:
  """A run with one checkpoint; its state."""
  config = tiny_drafter_config(tiny_target_config(67), **parts)
  write_run(str(directory), get_config(), Run("sum", config, ids))
  columns = None if ids is None else len(ids)
  state = random_state(DFlash(config), columns, averaged)
  checkpoints = Checkpoints(directory, keep=1)
  checkpoints.save(state, tau=2.0)
  like = jax.tree.map(jnp.zeros_like, state)
  assert_same(checkpoints.restore(like), state)
  checkpoints.close()
  return state


def assert_same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
  ("kind", "ids"),
  [("dflash2", IDS), ("dspark rnn", IDS), ("domino shifted", None)],
)
def test_what_was_trained_is_what_loads(tmp_path, kind, ids):
  state = make_run(tmp_path / "run", VARIANTS[kind], ids)
  exported = export(
    str(tmp_path / "run"), str(tmp_path / "drafter"), dtype="float32"
  )
  config, params, vocabulary = weights.load_drafter(tmp_path / "drafter")
  assert_same(params, state.drafter)
  assert (None if vocabulary is None else tuple(vocabulary)) == ids
  assert exported.parameters == DFlash(config).count_parameters()


@pytest.mark.parametrize(
  "name",
  [
    "eagle3",
    *(
      pytest.param(name, marks=pytest.mark.slow)
      for name in ("eagle3 whole", "lm", "lm own")
    ),
  ],
)
def test_a_baseline_is_written_as_others_read_it(tmp_path, name):
  """Its parameters, and the tables that a reader would miss."""
  draft = {
    "eagle3": {"name": "eagle3", "num_layers": 1, "draft_vocabulary": 5},
    "eagle3 whole": {"name": "eagle3", "num_layers": 1},
    "lm": {"name": "lm", "num_layers": 2},
    "lm own": {"name": "lm", "num_layers": 1, "lm_width": 14},
  }[name]
  config = get_config()
  config.drafter = DraftConfig(block_size=4, taps=(1, 3, 4), **draft)
  network = design_drafter(config, config.target.random)
  drafter = make_drafter(config.drafter, network)
  ids = IDS if name == "eagle3" else None
  write_run(str(tmp_path / "run"), config, Run("sum", network, ids))
  columns = None if ids is None else len(ids)
  state = random_state(drafter, columns, averaged=False)
  checkpoints = Checkpoints(tmp_path / "run", keep=1)
  checkpoints.save(state, tau=2.0)
  assert_same(checkpoints.restore(jax.tree.map(jnp.zeros_like, state)), state)
  checkpoints.close()
  exported = export(
    str(tmp_path / "run"), str(tmp_path / "drafter"), dtype="float32"
  )
  assert exported.parameters == drafter.count_parameters()
  config.drafter = DraftConfig(path=str(tmp_path / "drafter"), block_size=4)
  config.decode = DecodeConfig(max_length=64)
  model = load(config)
  assert model.drafter.config == network
  found = model.params.drafter
  if ids:
    assert found["head_ids"].tolist() == list(IDS)
  assert_same(
    drafter.bind(state.drafter, model.params.borrowed),
    {name: part for name, part in found.items() if name != "head_ids"},
  )
  text = generate(model, "Hi", max_new_tokens=13).text
  assert text == generate(model.without_drafter(), "Hi", max_new_tokens=13).text


def test_averaged_weights_are_what_is_exported(tmp_path):
  state = make_run(tmp_path / "run", VARIANTS["dspark"], None, averaged=True)
  export(str(tmp_path / "run"), str(tmp_path / "drafter"), dtype="float32")
  _, params, _ = weights.load_drafter(tmp_path / "drafter")
  assert_same(params, state.drafter)
  latest = dataclasses.replace(state, average=None).drafter
  assert not np.allclose(
    params["corrector"]["before"], latest["corrector"]["before"]
  )
