# Copyright 2026 The dflash_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the goldens of targets with experts, sinks, windows or Gemma's norms.

As targets.py, whose cases are plain; files and arrays are the same.

  python tools/goldens/targets_more.py --out tests/goldens/targets
  python tools/goldens/targets_more.py --out tests/goldens/targets --check
"""

import argparse
import json
import pathlib
import shutil
import tempfile

import safetensors.torch
import torch
import transformers
from targets import MIN_MARGIN, compute, round_parameters, write_json

NUM_TOKENS = 13  # more than any window

_COMMON = {
  "num_hidden_layers": 4,
  "max_position_embeddings": 128,
  "initializer_range": 0.25,
  "tie_word_embeddings": False,
  "bos_token_id": None,
  "pad_token_id": None,
  "eos_token_id": 2,
}
_QWEN3_MOE = _COMMON | {
  "vocab_size": 101,
  "hidden_size": 26,
  "intermediate_size": 34,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 10,
  "rms_norm_eps": 1e-6,
  "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
  "moe_intermediate_size": 14,
  "num_experts": 7,
  "num_experts_per_tok": 3,
  "norm_topk_prob": True,
}
_QWEN2 = _COMMON | {
  "vocab_size": 89,
  "num_hidden_layers": 3,
  "hidden_size": 30,
  "intermediate_size": 26,
  "num_attention_heads": 3,
  "num_key_value_heads": 1,
  "rms_norm_eps": 1e-6,
  "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
  "use_sliding_window": True,
  "sliding_window": 5,
  "max_window_layers": 1,
}
_GPT_OSS = _COMMON | {
  "vocab_size": 97,
  "hidden_size": 30,
  "intermediate_size": 22,
  "num_attention_heads": 6,
  "num_key_value_heads": 3,
  "head_dim": 12,
  "rms_norm_eps": 1e-5,
  "rope_parameters": {
    "rope_type": "yarn",
    "rope_theta": 150.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
  },
  "sliding_window": 5,
  "num_local_experts": 5,
  "num_experts_per_tok": 2,
  "swiglu_limit": 1.5,
}
_GEMMA3 = _COMMON | {
  "num_hidden_layers": 7,
  "vocab_size": 103,
  "hidden_size": 24,
  "intermediate_size": 38,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 14,
  "rms_norm_eps": 1e-6,
  "rope_parameters": {
    "full_attention": {
      "rope_type": "linear",
      "factor": 8.0,
      "rope_theta": 1000.0,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
  },
  "sliding_window": 5,
  "query_pre_attn_scalar": 19,
  "tie_word_embeddings": True,
}
_VISION = {
  "hidden_size": 8,
  "intermediate_size": 6,
  "num_hidden_layers": 1,
  "num_attention_heads": 2,
  "image_size": 8,
  "patch_size": 4,
}

# config, store: dtype on disk; shard: largest shard; mxfp4: experts in 4 bits.
CASES = {
  "qwen3_moe": {
    "family": "Qwen3Moe",
    "config": _QWEN3_MOE | {"mlp_only_layers": [1]},
  },
  "qwen3_moe_sharded": {
    "family": "Qwen3Moe",
    "config": _QWEN3_MOE | {"norm_topk_prob": False, "decoder_sparse_step": 2},
    "store": "bfloat16",
    "shard": "40KB",
  },
  "gpt_oss": {"family": "GptOss", "config": _GPT_OSS},
  "gpt_oss_mxfp4": {
    "family": "GptOss",
    "config": _GPT_OSS
    | {"hidden_size": 64, "intermediate_size": 32, "swiglu_limit": 2.0},
    "store": "bfloat16",
    "mxfp4": True,
  },
  "qwen2_window": {"family": "Qwen2", "config": _QWEN2},
  "gemma3": {"family": "Gemma3", "config": _GEMMA3},
  "gemma3_vision": {
    "family": "Gemma3",
    "config": _GEMMA3 | {"sliding_window": 4, "query_pre_attn_scalar": 14},
    "store": "bfloat16",
    "shard": "40KB",
    "vision": _VISION,
  },
}
# Keys of Gemma 3 that its published configs leave to the defaults.
GEMMA3_UNSAID = ("hidden_activation", "attention_bias", "layer_types")


def randomize(model, family):
  """Norms, biases, sinks and routers off the values that would hide a fault."""
  center = 0.0 if family == "Gemma3" else 1.0
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn_like(value)
      if name.endswith("sinks"):
        value.copy_(2.0 + noise)
      elif name.endswith("bias"):
        value.copy_(0.3 * noise)
      elif ".mlp.gate." in name or ".mlp.router." in name:
        value.copy_(0.5 * noise)
      elif value.ndim == 1:
        value.copy_(center + 0.3 * noise)


def configure(case):
  """Returns the config of a case and the class of its model."""
  config = json.loads(json.dumps(case["config"]))
  if "vision" in case:
    text = transformers.Gemma3TextConfig(**config)
    vision = transformers.SiglipVisionConfig(**case["vision"])
    whole = transformers.Gemma3Config(
      text_config=text,
      vision_config=vision,
      mm_tokens_per_image=4,
      boi_token_index=98,
      eoi_token_index=99,
      image_token_index=100,
      eos_token_id=[2, 5],
    )
    return whole, transformers.Gemma3ForConditionalGeneration
  suffix = "TextConfig" if case["family"] == "Gemma3" else "Config"
  config = getattr(transformers, case["family"] + suffix)(**config)
  return config, getattr(transformers, case["family"] + "ForCausalLM")


def build(case, seed):
  """Returns a random float32 model of the case."""
  torch.manual_seed(seed)
  config, model_class = configure(case)
  model = model_class(config).eval()
  randomize(model, case["family"])
  round_parameters(model, getattr(torch, case.get("store", "float32")))
  return model


# --- MXFP4 --------------------------------------------------------------------


def draw_mxfp4(tensors, seed):
  """Replaces expert matrices by random blocks of 4 bits and their scales."""
  generator = torch.Generator().manual_seed(seed)

  def draw(low, high, shape):
    return torch.randint(
      low, high, shape, generator=generator, dtype=torch.uint8
    )

  for name in list(tensors):
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
      count, width_in, width_out = tensors.pop(name).shape
      shape = (count, width_out, width_in // 32)
      tensors[name + "_blocks"] = draw(0, 256, (*shape, 16))
      tensors[name + "_scales"] = draw(118, 123, shape)


def store_mxfp4(folder, seed):
  """Rewrites a saved model so that its experts are in 4 bits."""
  path = folder / "model.safetensors"
  tensors = safetensors.torch.load_file(path)
  draw_mxfp4(tensors, seed)
  safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
  config = json.loads((folder / "config.json").read_text())
  config["quantization_config"] = {
    "modules_to_not_convert": [
      "model.layers.*.self_attn",
      "model.layers.*.mlp.router",
      "model.embed_tokens",
      "lm_head",
    ],
    "quant_method": "mxfp4",
  }
  write_json(folder / "config.json", config)


def expert_arrays(model):
  """The matrices that transformers makes of the first layer's blocks."""
  experts = model.model.layers[0].mlp.experts
  return {
    "experts.gate_up_proj": experts.gate_up_proj.detach().clone(),
    "experts.down_proj": experts.down_proj.detach().clone(),
  }


# --- Files --------------------------------------------------------------------


def hub_config(config):
  """Returns the config as checkpoints made before transformers 5 spell it."""
  config = json.loads(json.dumps(config))
  config.pop("transformers_version", None)
  for key in ("dtype", "_sliding_window_pattern"):
    config.pop(key, None)
  if "text_config" in config:
    text = hub_config(config["text_config"])
    config["text_config"] = {
      k: v for k, v in text.items() if k not in GEMMA3_UNSAID
    }
    return config
  rope = config.pop("rope_parameters")
  if "full_attention" in rope:
    config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    rope = rope["full_attention"]
    config.pop("layer_types")
    config["sliding_window_pattern"] = 6
  config["rope_theta"] = rope.pop("rope_theta")
  plain = rope["rope_type"] == "default"
  config["rope_scaling"] = None if plain else rope
  if config["model_type"] == "qwen2":
    config.pop("layer_types")
  if "num_local_experts" in config and config["model_type"] == "qwen3_moe":
    config["num_experts"] = config.pop("num_local_experts")
  return config


def load(folder, config_name="config.json"):
  """Returns the stored model in float32, read with the named config."""
  with tempfile.TemporaryDirectory() as temporary:
    copy = pathlib.Path(temporary) / "model"
    shutil.copytree(folder, copy)
    shutil.copyfile(folder / config_name, copy / "config.json")
    config = transformers.AutoConfig.from_pretrained(copy)
    kind = getattr(transformers, config.architectures[0])
    # The eager experts take matrices of any size.
    options = {"experts_implementation": "eager"}
    if getattr(config, "quantization_config", None):
      options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    return kind.from_pretrained(copy, dtype=torch.float32, **options).eval()


def write_model(name, out, seed):
  """Writes the model of one case, and returns it as its files have it."""
  case, folder = CASES[name], out / name
  if folder.exists():
    shutil.rmtree(folder)
  model = build(case, seed).to(getattr(torch, case.get("store", "float32")))
  model.save_pretrained(folder, max_shard_size=case.get("shard", "1GB"))
  (folder / "generation_config.json").unlink(missing_ok=True)
  if case.get("mxfp4"):
    store_mxfp4(folder, seed)
  config = json.loads((folder / "config.json").read_text())
  write_json(folder / "config_hub.json", hub_config(config))
  return load(folder)


def write_case(name, out):
  """Writes one case directory and returns the facts about it."""
  vocab = CASES[name]["config"]["vocab_size"]
  for seed in range(1000):
    model = write_model(name, out, seed)
    torch.manual_seed(1000 + seed)
    tokens = torch.randint(3, vocab - 5, (2, NUM_TOKENS))
    arrays, margin = compute(model, tokens)
    varied = min(len(set(row.tolist())) for row in arrays["greedy"])
    if margin > MIN_MARGIN and varied >= 8:
      break
  else:
    raise ValueError(f"{name}: no seed keeps its greedy path off ties")
  if CASES[name].get("mxfp4"):
    arrays |= {
      k: v.to(torch.bfloat16).contiguous()
      for k, v in expert_arrays(model).items()
    }
  safetensors.torch.save_file(arrays, out / name / "golden.safetensors")
  return {"seed": seed, "margin": margin, "distinct": varied}


def check_case(name, out):
  """Recomputes one stored case from its files; raises where it differs."""
  folder, worst = out / name, 0.0
  golden = safetensors.torch.load_file(folder / "golden.safetensors")
  for config_name in ("config.json", "config_hub.json"):
    model = load(folder, config_name)
    arrays, margin = compute(model, golden["tokens"].long())
    if CASES[name].get("mxfp4"):
      arrays |= expert_arrays(model)
    for key, value in golden.items():
      found = arrays[key].to(value.dtype)
      torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
      worst = max(worst, (found - value).abs().max().item())
  return {"margin": margin, "difference": worst}


def main():
  """Writes or checks the cases named on the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--case", action="append", choices=sorted(CASES))
  parser.add_argument("--check", action="store_true")
  args = parser.parse_args()
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  work = check_case if args.check else write_case
  for name in args.case or CASES:
    print(name, json.dumps(work(name, args.out)), flush=True)


if __name__ == "__main__":
  main()
