"""How much of a GPU's peak an update reaches at a published drafter's shape.

    python -m tools.bench_mfu
    python -m tools.bench_mfu --accumulate=1 --anchor_chunk=32 --loss_chunk=128

An update of configs/qwen3_8b.py on one GPU of the eight that share its batch:
the published drafter, 1,048,626,432 parameters, 512 anchors of 16 slots in each
of four rows of 3072 tokens, all 151,936 columns of the head. The target's
features and tables are random numbers and its layers are not there: what is
measured is the drafter's own training. MFU counts what the mathematics asks
for (train/meter.py), not what is computed again to save memory.
"""

import argparse
import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs.qwen3_8b import get_config
from dflash_jax.drafters import DFlash
from dflash_jax.model import borrow
from dflash_jax.networks import TargetConfig
from dflash_jax.target import Target
from train.design import design_drafter
from train.meter import peak_flops, update_flops
from train.state import Batch
from train.step import Trainer

TARGET = TargetConfig(
  family="qwen3",
  num_layers=36,
  width=4096,
  mlp_width=12288,
  num_heads=32,
  num_kv_heads=8,
  head_width=128,
  vocab_size=151936,
  rotary_base=1e6,
  qk_norm=True,
)
PARAMETERS = 1_048_626_432  # of the published drafter
DEVICES = 8  # that share the batch of the config
SETTINGS = ("accumulate", "num_anchors", "anchor_chunk", "loss_chunk") + (
  "sequence_length",
)
PROMPT = 128  # tokens of a row that are not supervised


def make_batch(trainer: Trainer, rows: int, length: int) -> Batch:
  """Random tokens, and states of unit size for them."""
  rng = np.random.default_rng(0)
  shape = (rows, length)
  width = len(trainer.layers_read) * TARGET.width
  return Batch(
    tokens=jnp.asarray(rng.integers(0, TARGET.vocab_size, shape), jnp.int32),
    loss_mask=jnp.broadcast_to(jnp.arange(length) >= PROMPT, shape),
    documents=jnp.zeros(shape, jnp.int32),
    taps=jax.random.normal(jax.random.key(0), (*shape, width), jnp.bfloat16),
  )


def make_tables(key: jax.Array) -> dict:
  """The target's embedding, head and final norm, without its layers."""
  embedding, head = jax.random.split(key)
  shape = (TARGET.vocab_size, TARGET.width)

  def draw(key, shape):
    return jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5

  return {
    "embedding": draw(embedding, shape),
    "head": {"kernel": draw(head, shape[::-1])},
    "norm": {"scale": jnp.ones(TARGET.width, jnp.bfloat16)},
  }


def main() -> None:
  """Prints one JSON object."""
  config = get_config()
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument(
    "--rows", type=int, default=config.train.batch_size // DEVICES
  )
  for name in SETTINGS:
    parser.add_argument(
      f"--{name}", type=int, default=getattr(config.train, name)
    )
  parser.add_argument("--updates", type=int, default=8)
  options = parser.parse_args()

  settings = dataclasses.replace(
    config.train,
    batch_size=options.rows,
    **{name: getattr(options, name) for name in SETTINGS},
  )
  drafter = DFlash(design_drafter(config, TARGET))
  assert drafter.count_parameters() == PARAMETERS
  trainer = Trainer.create(Target(TARGET), drafter, settings)
  params = make_tables(jax.random.key(1))
  borrowed = borrow(params, None)
  batch = make_batch(trainer, options.rows, options.sequence_length)
  state = trainer.init_state(jax.random.key(2), jnp.ones(trainer.tap_width))
  flops = update_flops(trainer, state, params, borrowed, batch)

  def update(state):
    state, sums, _ = trainer.update(state, params, borrowed, batch)
    jax.block_until_ready((state, sums))
    return state, sums

  start = time.perf_counter()
  state, sums = update(state)
  compiled_s = time.perf_counter() - start
  seconds = []
  for _ in range(options.updates):
    start = time.perf_counter()
    state, sums = update(state)
    seconds.append(time.perf_counter() - start)

  device = jax.devices()[0]
  second = float(np.median(seconds))
  peak = peak_flops(device.device_kind, settings.compute_dtype)
  memory = device.memory_stats() or {}
  print(
    json.dumps(
      {
        "device": device.device_kind,
        "options": vars(options),
        "tflop": flops / 1e12,
        "seconds": second,
        "spread": [min(seconds), max(seconds)],
        "mfu": peak and flops / second / peak,
        "slots_per_s": float(sums.supervised.sum()) / second,
        "peak_memory_gb": memory.get("peak_bytes_in_use", 0) / 1e9,
        "compiled_s": compiled_s,
        "loss": float(sums.loss / sums.weight),
      }
    )
  )


if __name__ == "__main__":
  main()
