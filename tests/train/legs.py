"""Trains on a mesh, in stretches, and says how it went: one JSON line each.

    python -m tests.train.legs CORPUS LEGS [COORDINATOR PROCESSES PROCESS]

LEGS is a JSON list of the fields of Leg. Devices are those of the machine, as
XLA_FLAGS makes them, and of the other processes.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import numpy as np

from dflash_jax.networks import Confidence, Convolution, Markov
from tests.testing import tiny_model
from tests.train.conftest import STOP_IDS, make_setup
from train import mesh as mesh_lib
from train import processes
from train.checkpoint import Checkpoints, _checksums
from train.corpus import Corpus
from train.setup import Setup

STEPS, SAVED = 6, 3
ONE_LAYER = {"num_layers": 1, "layer_windows": (), "layer_causal": ()}
RICH = {  # a part of each kind
  "anchor_predicts": True,
  "convolution": Convolution(2, 4),
  "markov": Markov(8, "gated"),
  "confidence": Confidence(),
}
SETTINGS = {"batch_size": 16, "steps": 20, "learning_rate": 1e-3}


@dataclasses.dataclass(frozen=True)
class Leg:
  """A stretch of training.

  Attributes:
    name: of it.
    fsdp: of the mesh of all devices; 0 for the first device alone.
    load: directory of a checkpoint at step SAVED, or "" to start.
    save: directory for one.
    is_rich: whether the drafter has a part of each kind.
    settings: of TrainConfig, besides those of all.
  """

  name: str
  fsdp: int = 0
  load: str = ""
  save: str = ""
  is_rich: bool = False
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def place(setup: Setup, fsdp: int) -> Setup:
  """The same, on the mesh of all devices; 0 leaves it on one."""
  if not fsdp:
    return setup
  config = dataclasses.replace(setup.trainer.config, fsdp=fsdp)
  mesh = mesh_lib.make_mesh(config)
  target_params, borrowed = mesh_lib.replicate(
    mesh, (setup.target_params, setup.borrowed)
  )
  return dataclasses.replace(
    setup,
    trainer=dataclasses.replace(setup.trainer, mesh=mesh),
    target_params=target_params,
    borrowed=borrowed,
  )


def share_of_first(tree: Any) -> float:
  """Bytes on the first device, of all bytes of the tree."""
  leaves = jax.tree.leaves(tree)
  here = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
  return here / sum(leaf.nbytes for leaf in leaves)


def spread(setup: Setup) -> Any:
  """The target's parameters, split as the drafter's are."""
  mesh = setup.trainer.mesh
  if mesh is None:
    return setup.target_params
  return jax.tree.map(
    lambda leaf: jax.device_put(leaf, mesh_lib.share(mesh, leaf)),
    setup.target_params,
  )


def run(setup: Setup, tap_scale: np.ndarray, leg: Leg) -> dict[str, Any]:
  """Trains the leg."""
  setup = place(setup, leg.fsdp)
  trainer = setup.trainer
  state = trainer.init_state(jax.random.key(1), tap_scale)
  if leg.load:
    state = Checkpoints(leg.load, keep=2, read_only=True).restore(state)
  losses = []
  for step in range(int(state.step), STEPS):
    state, sums, norms = trainer.update(
      state, setup.target_params, setup.borrowed, setup.train_batch(step)
    )
    losses.append(float(sums.loss) / float(sums.weight))
    if leg.save and step + 1 == SAVED:
      checkpoints = Checkpoints(leg.save, keep=2)
      checkpoints.save(state, tau=1.0)
      checkpoints.close()
  part = setup.evaluation[:3]
  right, sums = trainer.matches(
    state.drafter, setup.target_params, setup.borrowed, setup.batch(part)
  )
  return {
    "name": leg.name,
    "losses": losses,
    "norm": float(norms["update_norm"]),
    "right": np.asarray(right)[:3].sum((0, 1)).tolist(),
    "loss": float(sums.loss) / float(sums.weight),
    "share": share_of_first((state.params, state.optimizer, state.average)),
    "checksums": _checksums({"params": spread(setup)}),
  }


def main(corpus: str, legs: str, *others: str) -> None:
  """Meets the other processes, if there are any, and trains."""
  if others:
    coordinator, count, number = others
    processes.join(coordinator, int(number), int(count))
  model = tiny_model(drafter=False, eos_ids=STOP_IDS)
  ready: dict[str, tuple[Setup, np.ndarray]] = {}
  for leg in map(lambda fields: Leg(**fields), json.loads(legs)):
    kind = json.dumps([leg.is_rich, leg.settings])
    if kind not in ready:
      parts = ONE_LAYER | (RICH if leg.is_rich else {})
      settings = SETTINGS | leg.settings
      setup = make_setup(model, Corpus([corpus]), parts=parts, **settings)
      ready[kind] = setup, setup.tap_scale()
    print(json.dumps(run(*ready[kind], leg)), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
