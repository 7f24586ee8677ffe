"""Every tensor of a target, by its published name."""

import dataclasses
from typing import Literal

from dflash_jax.config import TargetConfig
from dflash_jax.weights import names
from dflash_jax.weights.experts import expert_table

Style = Literal["huggingface", "gguf"]

# Where there is a norm after each sublayer too.
_POST_NORM_NAMES: dict[names.Path, tuple[str, str]] = {
  ("attention_post_norm", "scale"): (
    "post_attention_layernorm.weight",
    "post_attention_norm.weight",
  ),
  ("mlp_norm", "scale"): (
    "pre_feedforward_layernorm.weight",
    "ffn_norm.weight",
  ),
  ("mlp_post_norm", "scale"): (
    "post_feedforward_layernorm.weight",
    "post_ffw_norm.weight",
  ),
}
_TOP_NAMES: dict[names.Path, tuple[str, str]] = {
  ("embedding",): ("model.embed_tokens.weight", "token_embd.weight"),
  ("norm", "scale"): ("model.norm.weight", "output_norm.weight"),
  ("head", "kernel"): ("lm_head.weight", "output.weight"),
}
_LAYER_PREFIX = ("model.layers.{}.", "blk.{}.")


def target_table(
  config: TargetConfig, style: Style = "huggingface"
) -> names.Table:
  """Every tensor of a target's checkpoint, by its name in the file.

  Args:
    config: the target. A tied head has no row: see names.tie_head.
    style: whose names.
  """
  column = 0 if style == "huggingface" else 1
  V, D = config.vocab_size, config.width
  top: dict[names.Path, tuple[int, ...]] = {
    ("embedding",): (V, D),
    ("norm", "scale"): (D,),
  }
  if not config.tied_head:
    top["head", "kernel"] = (V, D)
  table = {
    _TOP_NAMES[path][column]: names.make_row(path, top[path]) for path in top
  }
  layer_names = names.LAYER_NAMES | (
    _POST_NORM_NAMES if config.post_norms else {}
  )
  shapes = _target_layer_shapes(config)
  for i in range(config.num_layers):
    prefix = _LAYER_PREFIX[column].format(i)
    for path, shape in shapes.items():
      if path[0] == "mlp" and config.has_experts(i):
        continue
      name = prefix + layer_names[path][column]
      table[name] = names.make_row(("layers", i, *path), shape)
    if config.has_experts(i):
      for name, row in expert_table(config).items():
        path = ("layers", i, *row.path)
        table[prefix + name] = dataclasses.replace(row, path=path)
  return table


def _target_layer_shapes(
  config: TargetConfig,
) -> dict[names.Path, tuple[int, ...]]:
  shapes = names.layer_shapes(
    config, bias=config.qkv_bias, norms=config.qk_norm
  )
  D = config.width
  if config.output_bias:
    shapes["attention", "output", "bias"] = (D,)
  if config.attention_sinks:
    shapes["attention", "sinks"] = (config.num_heads,)
  if config.post_norms:
    shapes["attention_post_norm", "scale"] = (D,)
    shapes["mlp_post_norm", "scale"] = (D,)
  return shapes
