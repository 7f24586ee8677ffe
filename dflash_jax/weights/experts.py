"""Experts in files, and in the tree of parameters.

Files of Qwen3-MoE hold three matrices of every expert, [F, D] and [D, F]:

  mlp.gate.weight, mlp.experts.7.{gate,up,down}_proj.weight

Files of gpt-oss hold all experts in two arrays, and those [in, out]; columns of
gate and up take turns:

  mlp.router.{weight,bias}
  mlp.experts.gate_up_proj [E, D, 2F], mlp.experts.gate_up_proj_bias [E, 2F]
  mlp.experts.down_proj [E, F, D], mlp.experts.down_proj_bias [E, D]

In the tree both are "gate", "up" and "down", kernels [E, in, out].
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from dflash_jax.config import TargetConfig
from dflash_jax.weights.names import Params, Table, TensorRow

_MATRICES = ("gate", "up", "down")
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def expert_table(config: TargetConfig) -> Table:
  """Rows of one layer's experts; names and paths begin behind the layer's."""
  experts = config.experts
  assert experts is not None
  D, E, F = config.width, experts.count, experts.width
  mlp = ("mlp",)
  if config.family == "qwen3_moe":
    table = {
      "mlp.gate.weight": TensorRow((*mlp, "router", "kernel"), True, (E, D))
    }
    for expert in range(E):
      for matrix in _MATRICES:
        path = (*mlp, "experts", expert, matrix, "kernel")
        shape = (D, F) if matrix == "down" else (F, D)
        name = f"mlp.experts.{expert}.{matrix}_proj.weight"
        table[name] = TensorRow(path, True, shape)
    return table
  gate_up, down = FUSED
  return {
    "mlp.router.weight": TensorRow((*mlp, "router", "kernel"), True, (E, D)),
    "mlp.router.bias": TensorRow((*mlp, "router", "bias"), False, (E,)),
    gate_up: TensorRow((*mlp, "gate_up", "kernel"), False, (E, D, 2 * F)),
    gate_up + "_bias": TensorRow((*mlp, "gate_up", "bias"), False, (E, 2 * F)),
    down: TensorRow((*mlp, "down", "kernel"), False, (E, F, D)),
    down + "_bias": TensorRow((*mlp, "down", "bias"), False, (E, D)),
  }


def gather(params: Params, config: TargetConfig) -> None:
  """From the tree as files have it to that of the formulas, layer by layer."""
  split = _stack if config.family == "qwen3_moe" else _take_turns
  _change(params, config, split)


def scatter(params: Params, config: TargetConfig) -> Params:
  """The inverse of `gather`; the parameters given stay as they are."""
  layers = {i: dict(layer) for i, layer in params["layers"].items()}
  params = {**params, "layers": layers}
  join = _unstack if config.family == "qwen3_moe" else _interleave
  _change(params, config, join)
  return params


def _change(
  params: Params, config: TargetConfig, change: Callable[[Params], Params]
) -> None:
  for i, layer in params["layers"].items():
    if config.has_experts(i):
      layer["mlp"] = change(layer["mlp"])


def _stack(mlp: Params) -> Params:
  experts = mlp["experts"]
  stacked = {
    matrix: {
      "kernel": jnp.stack(
        [experts[i].pop(matrix)["kernel"] for i in sorted(experts)]
      )
    }
    for matrix in _MATRICES
  }
  return {"router": mlp["router"], **stacked}


def _unstack(mlp: Params) -> Params:
  count = len(mlp["gate"]["kernel"])
  experts = {
    i: {matrix: {"kernel": mlp[matrix]["kernel"][i]} for matrix in _MATRICES}
    for i in range(count)
  }
  return {"router": mlp["router"], "experts": experts}


def _take_turns(mlp: Params) -> Params:
  both = mlp.pop("gate_up")
  return {
    **mlp,
    "gate": {name: leaf[..., 0::2] for name, leaf in both.items()},
    "up": {name: leaf[..., 1::2] for name, leaf in both.items()},
  }


def _interleave(mlp: Params) -> Params:
  def join(gate: Any, up: Any) -> Any:
    return jnp.stack([gate, up], axis=-1).reshape(*gate.shape[:-1], -1)

  both = {
    name: join(leaf, mlp["up"][name]) for name, leaf in mlp["gate"].items()
  }
  kept = {name: mlp[name] for name in ("router", "down")}
  return {**kept, "gate_up": both}
