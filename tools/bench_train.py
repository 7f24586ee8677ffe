"""Times updates of a drafter in supervised slots per second, on one batch.

    python tools/bench_train.py                 # milliseconds, slots/s
    python tools/bench_train.py --write=DIR     # writes what it trained on, too

The shapes and the loss are a config's, configs/smollm2_135m_cpu.py by default:
its target's own tables and features, as a feature cache would hold them, of
random tokens, in float32 unless told otherwise. tools/bench_train_torch.py
compares a plain PyTorch implementation of the same updates.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from dflash_jax import config_file
from dflash_jax.drafters import DFlash
from dflash_jax.model import borrow, load_target
from train.anchors import row_keys
from train.design import design_drafter
from train.meter import update_flops
from train.optimizer import make_schedule
from train.state import Batch, TrainState
from train.step import Trainer

PROMPT = 64  # tokens of a row that are not supervised
CHECKED = 3  # updates whose losses are written


@dataclasses.dataclass(frozen=True)
class Bench:
  """One trainer, what it trains on, and its state."""

  trainer: Trainer
  target_params: dict
  borrowed: object
  batch: Batch
  state: TrainState

  @classmethod
  def create(cls, path: str, dtype: str) -> "Bench":
    """Of the config at `path`, computing in `dtype`."""
    config = config_file.read(path)
    target, params = load_target(config)
    params = jax.tree.map(
      lambda x: x.astype(dtype) if x.ndim > 1 else x, params
    )
    columns = config.drafter.draft_vocabulary or target.config.vocab_size
    train = dataclasses.replace(config.train, compute_dtype=dtype)
    drafter = DFlash(design_drafter(config, target.config))
    trainer = Trainer.create(target, drafter, train)
    B, S = train.batch_size, train.sequence_length
    rng = np.random.default_rng(0)
    batch = Batch(
      tokens=jnp.asarray(rng.integers(100, columns, (B, S)), jnp.int32),
      loss_mask=jnp.broadcast_to(jnp.arange(S) >= PROMPT, (B, S)),
      documents=jnp.zeros((B, S), jnp.int32),
    )
    taps = jax.jit(trainer.learner.taps)(params, batch)
    batch = dataclasses.replace(batch, taps=taps.astype(jnp.float16))
    width = trainer.tap_width
    return cls(
      trainer=trainer,
      target_params=params,
      borrowed=borrow(params, np.arange(columns)),
      batch=batch,
      state=trainer.init_state(jax.random.key(1), jnp.ones(width), columns),
    )

  def run(self, updates: int) -> tuple[list[float], np.ndarray, float]:
    """Losses; milliseconds f[updates, 2], wall and processor; slots of one."""
    state = jax.tree.map(jnp.copy, self.state)
    losses, spent = [], []
    slots = 0.0
    for _ in range(updates):
      start = time.perf_counter(), time.process_time()
      state, sums, _ = self.trainer.update(
        state, self.target_params, self.borrowed, self.batch
      )
      jax.block_until_ready((state, sums))
      end = time.perf_counter(), time.process_time()
      spent.append(1e3 * np.subtract(end, start))
      losses.append(float(sums.loss / sums.weight))
      slots = float(sums.supervised.sum())
    return losses, np.array(spent), slots

  def write(self, directory: pathlib.Path) -> None:
    """What another implementation needs to make the same updates."""
    directory.mkdir(parents=True, exist_ok=True)
    trainer, batch = self.trainer, self.batch
    arrays = {
      f"params{jax.tree_util.keystr(path)}": leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(self.state.params)
    }
    arrays |= {
      "embedding": self.borrowed.embedding,
      "head": self.borrowed.head,
      "target_norm": self.target_params["norm"]["scale"],
      "tokens": batch.tokens,
      "taps": batch.taps,
    }
    for step in range(CHECKED):
      key = jax.random.fold_in(jax.random.key(trainer.config.seed), step)
      keys = row_keys(key, jnp.arange(len(batch.tokens)))
      blocks = trainer.learner.draw(keys, batch)
      arrays[f"anchors.{step}"] = blocks.anchors
      arrays[f"mask.{step}"] = blocks.mask
    safetensors.numpy.save_file(
      {name: np.ascontiguousarray(x) for name, x in arrays.items()},
      directory / "arrays.safetensors",
    )
    schedule = make_schedule(trainer.config)
    losses, _, slots = self.run(CHECKED)
    settings = {
      "drafter": dataclasses.asdict(trainer.drafter.config),
      "target_epsilon": trainer.target.config.norm_epsilon,
      "train": dataclasses.asdict(trainer.config),
      "rates": [float(schedule(step)) for step in range(CHECKED)],
      "losses": losses,
      "slots": slots,
    }
    (directory / "settings.json").write_text(json.dumps(settings))


def main() -> None:
  """Prints one JSON object."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--config", default="configs/smollm2_135m_cpu.py")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--updates", type=int, default=12)
  parser.add_argument("--write", type=pathlib.Path)
  arguments = parser.parse_args()
  bench = Bench.create(arguments.config, arguments.dtype)
  if arguments.write:
    bench.write(arguments.write)
  _, spent, slots = bench.run(arguments.updates + 2)
  wall, processor = np.median(spent[2:], axis=0)  # the first compile
  flops = update_flops(
    bench.trainer,
    bench.state,
    bench.target_params,
    bench.borrowed,
    bench.batch,
  )
  print(
    json.dumps(
      {
        "ms": wall,
        "processor_ms": processor,
        "slots_per_s": slots / wall * 1e3,
        "gflops_per_s": flops / wall / 1e6,
      }
    )
  )


if __name__ == "__main__":
  main()
