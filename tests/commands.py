"""Runs the project's programs the way a user does."""

import json
import os
import pathlib
import subprocess
import sys

import jax

from dflash_jax import model, weights
from dflash_jax.config import DrafterConfig
from dflash_jax.config_file import read
from dflash_jax.drafters import DFlash

ROOT = pathlib.Path(__file__).parents[1]
TINY = "configs/tiny.py"


def run_module(module, *arguments, text="", cwd=ROOT, **variables):
  """Runs python -m module; gives the finished process with its output."""
  return subprocess.run(
    [sys.executable, "-m", module, *arguments],
    input=text,
    cwd=cwd,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    | variables,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )


def run_each(module, lines):
  """Runs python -m module once for each list of arguments; as run_module.

  Without input, for one import: the way for many short runs.
  """
  told = run_module(
    "tests.forked", module, text="".join(f"{json.dumps(x)}\n" for x in lines)
  )
  assert told.returncode == 0, told.stderr
  ends = [json.loads(line) for line in told.stdout.splitlines()]
  return [
    subprocess.CompletedProcess(arguments, **end)
    for arguments, end in zip(lines, ends, strict=True)
  ]


def save_tiny_drafter(directory, **overrides):
  """Writes an untrained drafter for configs/tiny.py; gives its path."""
  config = read(ROOT / TINY)
  target, _ = model.load_target(config)
  network = target.config
  fields = {
    "num_layers": 1,
    "width": network.width,
    "mlp_width": 32,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_width": 8,
    "vocab_size": network.vocab_size,
    "block_size": 4,
    "mask_token_id": config.drafter.mask_token_id,
    "target_layer_ids": (1, 3),
    "num_target_layers": network.num_layers,
    "target_width": network.width,
  }
  draft = DrafterConfig(**fields | overrides)
  params = DFlash(draft).init(jax.random.key(5))
  weights.save_drafter(str(directory), draft, params, dtype="float32")
  return str(directory)
