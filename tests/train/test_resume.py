"""Every kind of drafter goes on after a stop, to the same bits."""

import dataclasses
import random

import jax
import numpy as np
import pytest

from configs.tiny import get_config
from dflash_jax.config import Config, to_json
from tests.train.programs import run
from train.checkpoint import Checkpoints
from train.loop import train
from train.record import MetricsLog
from train.setup import Setup

STEPS, KEEP_EVERY = 13, 5
DRAFTERS = {
  "dflash": {},
  "dflash2": {"selector_rank": 7, "selector_top_k": 5, "convolution_group": 4},
  "dspark": {"markov_rank": 6, "markov_kind": "rnn"},
  "domino": {"gru_width": 9, "gru_rank": 5},
  "eagle3": {"num_layers": 1, "taps": (0, 2, 4), "draft_vocabulary": 120},
  "lm": {"num_layers": 1, "lm_width": 16},
}
RECIPES = {
  "dflash2": {"loss": "ce + selector"},
  "dspark": {"loss": "0.1*ce + 1.8*tv + confidence"},
  "domino": {"curriculum": 1.0},
  "eagle3": {"loss": "kl", "slot_weights": "decay", "ema": 0.9},
  "lm": {"slot_weights": "uniform"},  # no teacher: nothing of the target
}


def configured(corpus: str, name: str) -> Config:
  """A tiny run of this kind of drafter."""
  config = get_config()
  config.drafter = dataclasses.replace(
    config.drafter, name=name, **DRAFTERS[name]
  )
  config.train = dataclasses.replace(
    config.train,
    corpus=(corpus,),
    steps=STEPS,
    checkpoint_every=KEEP_EVERY,
    evaluate_every=1000,
    log_every=3,
    sequence_length=48,
    optimizer="muon" if name == "eagle3" else "adamw",
    **RECIPES.get(name, {}),
  )
  return config


def final_state(config: Config, workdir):
  """The last checkpoint, bit for bit, and every held-out tau."""
  checkpoints = Checkpoints(workdir, keep=2, read_only=True)
  setup = Setup.create(config)
  columns = None if setup.head_ids is None else len(setup.head_ids)
  like = setup.trainer.init_state(jax.random.key(0), setup.tap_scale(), columns)
  state = checkpoints.restore(like)
  assert int(state.step) == STEPS
  return checkpoints.taus, state


class PowerCut(Exception):
  """Not one of the errors that the loop knows."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm", "eagle3"])
def test_a_baseline_stopped_and_resumed_ends_in_the_same_bits(
  corpus_directory, tmp_path, monkeypatch, name
):
  config = configured(corpus_directory, name)
  train(config, str(tmp_path / "whole"))
  write, lines = MetricsLog.write, []

  def cut(self, kind, step, values):
    lines.append(step)
    if step > KEEP_EVERY + 2:
      raise PowerCut
    write(self, kind, step, values)

  with monkeypatch.context() as patch, pytest.raises(PowerCut):
    patch.setattr(MetricsLog, "write", cut)
    train(config, str(tmp_path / "cut"))
  assert lines[-1] > KEEP_EVERY
  train(config, str(tmp_path / "cut"), resume=True)
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, tmp_path / "cut"),
    final_state(config, tmp_path / "whole"),
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_run_killed_at_a_random_step_ends_in_the_same_bits(
  corpus_directory, compiled, tmp_path, name
):
  """SIGKILL, wherever it comes, in a process of its own."""
  config = configured(corpus_directory, name)
  path = tmp_path / "config.py"
  path.write_text(
    "from dflash_jax.config import Config\n"
    "from dflash_jax.config_json import from_json\n"
    "def get_config():\n"
    f"  return from_json(Config, {to_json(config)!r}, 'record')\n"
  )

  def main(workdir, *more, **options):
    arguments = (f"--config={path}", f"--workdir={workdir}", *more)
    return run("train.main", *arguments, cache=compiled, **options)

  whole, cut = tmp_path / "whole", tmp_path / "cut"
  assert main(whole).returncode == 0
  step = random.Random(name).randrange(KEEP_EVERY + 1, STEPS)
  place = ("train.meter:Meter.follow", step)
  assert main(cut, kill_at=place).returncode == -9
  resumed = main(cut, "--resume")
  assert resumed.returncode == 0, resumed.stderr
  jax.tree.map(
    np.testing.assert_array_equal,
    final_state(config, cut),
    final_state(config, whole),
  )
