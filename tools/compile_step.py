"""Compiles a whole training step for GPUs that are not here.

    PYTHONPATH=.:.aot python tools/compile_step.py --targets=h100,b200

The step of configs/qwen3_4b.py, 512 anchors of 16 slots over a vocabulary of
151,936, on one GPU of the eight that share a batch: target's pass for the taps,
draft layers, head and loss, backward, update. It is compiled from abstract
weights, and must fit the smallest memory it is meant for, 80 GB, with the
target's 8 GB in it. Anchors double, and its memory must stay as it is. Needs
the packages of the extra `aot`; `make aot` brings them.
"""

import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from configs.qwen3_4b import get_config
from dflash_jax.drafters import DFlash
from dflash_jax.model import borrow
from dflash_jax.networks import TargetConfig
from dflash_jax.target import Target
from pallas_kernels import ahead
from train.design import design_drafter
from train.state import Batch
from train.step import Trainer

TARGET = TargetConfig(
  family="qwen3",
  num_layers=36,
  width=2560,
  mlp_width=9728,
  num_heads=32,
  num_kv_heads=8,
  head_width=128,
  vocab_size=151936,
  rotary_base=1e6,
  qk_norm=True,
  tied_head=True,
)
PARAMETERS = 537_427_200  # of the published drafter
DEVICES = 8  # that share the batch of the config
MEMORY = 80e9  # bytes
FLAT = 1.1  # growth of memory that is none
TARGETS = ("h100", "b200")
RESULT = "step: "  # begins a line of a child's output
TIMEOUT = 1800  # seconds for one compilation


@dataclasses.dataclass(frozen=True)
class Step:
  """What a compiled step takes of a GPU.

  Attributes:
    target: the GPU.
    anchors: of a row.
    rows: of the batch, on this GPU.
    argument_bytes: target, drafter, optimiser, batch.
    temporary_bytes: everything that lives no longer than the step.
    seconds: it took to compile.
  """

  target: str
  anchors: int
  rows: int
  argument_bytes: int
  temporary_bytes: int
  seconds: float

  @property
  def total(self) -> int:
    """Bytes; the state is updated in place."""
    return self.argument_bytes + self.temporary_bytes

  def __str__(self) -> str:
    """A line of the table, but for the verdict."""
    return (
      f"{self.target:6}{self.anchors:8}{self.rows:6}"
      f"{self.argument_bytes / 1e9:10.2f} GB"
      f"{self.temporary_bytes / 1e9:8.2f} GB"
      f"{self.total / 1e9:8.2f} GB{self.seconds:6.0f} s"
    )


def step_of(anchors: int) -> tuple[Trainer, tuple[Any, ...]]:
  """The step, and its operands as shapes."""
  config = get_config()
  settings = dataclasses.replace(
    config.train,
    num_anchors=anchors,
    batch_size=config.train.batch_size // DEVICES,
  )
  target = Target(TARGET)
  drafter = DFlash(design_drafter(config, TARGET))
  assert drafter.count_parameters() == PARAMETERS
  trainer = Trainer.create(target, drafter, settings)
  key = jax.random.key(0)

  def cast(leaf: Any) -> jax.ShapeDtypeStruct:
    dtype = settings.compute_dtype if leaf.ndim > 1 else leaf.dtype
    return jax.ShapeDtypeStruct(leaf.shape, dtype)

  params = jax.tree.map(cast, jax.eval_shape(lambda: target.init(key)))
  scale = jnp.ones((trainer.tap_width,))
  state = jax.eval_shape(lambda: trainer.init_state(key, scale))
  shape = (settings.batch_size, settings.sequence_length)
  batch = Batch(
    tokens=jax.ShapeDtypeStruct(shape, jnp.int32),
    loss_mask=jax.ShapeDtypeStruct(shape, bool),
    documents=jax.ShapeDtypeStruct(shape, jnp.int32),
  )
  return trainer, (state, params, borrow(params, None), batch)


def compile_step(target: str, anchors: int) -> Step:
  """The jitted call that the training loop makes, for a described GPU."""
  device, placed = ahead.describe(target)
  trainer, operands = step_of(anchors)
  operands = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), operands
  )
  start = time.perf_counter()
  with jax.default_device(device):
    compiled = Trainer.update.trace(trainer, *operands).lower().compile()
  memory = compiled.memory_analysis()
  return Step(
    target,
    anchors,
    trainer.config.batch_size,
    memory.argument_size_in_bytes,
    memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    time.perf_counter() - start,
  )


def run_child(case: tuple[str, int]) -> Step:
  """Compiles in a process of its own.

  Raises:
    RuntimeError: what the process said, if it failed.
  """
  target, anchors = case
  done = subprocess.run(
    [
      sys.executable,
      __file__,
      "--child",
      f"--targets={target}",
      f"--anchors={anchors}",
    ],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "PATH": f"{ahead.find_tools()}{os.pathsep}{os.environ['PATH']}",
      "PYTHONPATH": os.pathsep.join(sys.path),
    },
    capture_output=True,
    text=True,
    timeout=TIMEOUT,
  )
  if done.returncode:
    raise RuntimeError(f"{target}, {anchors} anchors:\n{done.stderr}")
  lines = done.stdout.splitlines()
  found = next(line for line in lines if line.startswith(RESULT))
  return Step(**json.loads(found.removeprefix(RESULT)))


def main(argv: list[str]) -> None:
  """Prints the table; exits with 1 if a step is not as it should be."""
  values = flags.FLAGS
  unknown = sorted({*values.targets} - {*TARGETS}) + argv[1:]
  if unknown:
    raise app.UsageError(
      f"{', '.join(unknown)} is unknown; --targets are {', '.join(TARGETS)}"
    )
  if values.child:
    step = compile_step(values.targets[0], values.anchors)
    print(RESULT + json.dumps(dataclasses.asdict(step)), flush=True)
    return
  sound = True
  print(
    f"{'GPU':6}{'anchors':>8}{'rows':>6}{'arguments':>13}{'temporary':>11}"
    f"{'total':>11}{'compiled':>8}"
  )
  for target in values.targets:
    cases = [(target, values.anchors), (target, 2 * values.anchors)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      once, twice = pool.map(run_child, cases)
    fits = once.total <= MEMORY
    is_flat = twice.temporary_bytes <= FLAT * once.temporary_bytes
    sound &= fits and is_flat
    print(f"{once}  {'ok' if fits else f'does not fit {MEMORY / 1e9:.0f} GB'}")
    print(f"{twice}  {'flat' if is_flat else 'grows with the anchors'}")
  if not sound:
    sys.exit(1)


if __name__ == "__main__":
  flags.DEFINE_list("targets", list(TARGETS), "GPUs to compile for.")
  flags.DEFINE_integer("anchors", get_config().train.num_anchors, "Of a row.")
  flags.DEFINE_bool("child", False, "Internal: compile in this process.")
  app.run(main)
