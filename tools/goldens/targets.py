# Copyright 2026 The dflash_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the target goldens: tiny random HF models and what torch says.

Each case is a directory that any Hugging Face loader reads, together with
the logits, per-layer states and greedy continuations that the transformers
library computes for it in float32. See README.md beside this file.

  python tools/goldens/targets.py --out tests/goldens/targets
  python tools/goldens/targets.py --out tests/goldens/targets --check
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import tempfile

import safetensors.torch
import torch
import transformers

NUM_TOKENS = 13
NUM_GREEDY = 40
MIN_MARGIN = 2e-3

_LLAMA = {
  "vocab_size": 97,
  "hidden_size": 30,
  "intermediate_size": 44,
  "num_hidden_layers": 3,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5,
  "initializer_range": 0.25,
  "tie_word_embeddings": False,
  "bos_token_id": 1,
  "eos_token_id": 2,
}
_QWEN3 = {
  "vocab_size": 101,
  "hidden_size": 28,
  "intermediate_size": 34,
  "num_hidden_layers": 4,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 12,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-6,
  "initializer_range": 0.25,
  "tie_word_embeddings": False,
  "bos_token_id": None,
  "eos_token_id": 2,
}
_SMOLLM2 = _LLAMA | {
  "vocab_size": 103,
  "hidden_size": 36,
  "num_hidden_layers": 5,
  "intermediate_size": 16,
  "num_attention_heads": 9,
  "num_key_value_heads": 3,
  "head_dim": 4,
  "tie_word_embeddings": True,
}
_QWEN2 = {
  "vocab_size": 89,
  "hidden_size": 40,
  "intermediate_size": 26,
  "num_hidden_layers": 3,
  "num_attention_heads": 5,
  "num_key_value_heads": 1,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-6,
  "initializer_range": 0.25,
  "tie_word_embeddings": True,
  "bos_token_id": None,
  "eos_token_id": 2,
}

# family: transformers class prefix. rope: transformers 5 rope_parameters.
# store: dtype on disk. shard: largest shard, or None for a single file.
CASES = {
  "llama2": {
    "family": "Llama",
    "config": _LLAMA,
    "rope": {"rope_type": "default", "rope_theta": 10000.0},
  },
  "llama3": {
    "family": "Llama",
    "config": _LLAMA
    | {"head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1},
    "rope": {
      "rope_type": "llama3",
      "rope_theta": 500.0,
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 32,
    },
  },
  "smollm2": {
    "family": "Llama",
    "config": _SMOLLM2,
    "rope": {"rope_type": "default", "rope_theta": 100000.0},
  },
  "qwen2": {
    "family": "Qwen2",
    "config": _QWEN2,
    "rope": {"rope_type": "default", "rope_theta": 1000000.0},
  },
  "qwen3": {
    "family": "Qwen3",
    "config": _QWEN3,
    "rope": {"rope_type": "default", "rope_theta": 1000000.0},
  },
  "qwen3_yarn": {
    "family": "Qwen3",
    "config": _QWEN3 | {"num_hidden_layers": 3, "max_position_embeddings": 64},
    "rope": {
      "rope_type": "yarn",
      "rope_theta": 100.0,
      "factor": 4.0,
      "original_max_position_embeddings": 16,
    },
  },
  "qwen3_bf16": {
    "family": "Qwen3",
    "config": _QWEN3,
    "rope": {"rope_type": "default", "rope_theta": 1000000.0},
    "store": "bfloat16",
  },
  "llama2_f16": {
    "family": "Llama",
    "config": _LLAMA | {"vocab_size": 79},
    "rope": {"rope_type": "default", "rope_theta": 10000.0},
    "store": "float16",
  },
  "llama_sharded": {
    "family": "Llama",
    "config": _LLAMA | {"vocab_size": 83},
    "rope": {"rope_type": "default", "rope_theta": 10000.0},
    "shard": "24KB",
  },
}


def randomize_small_tensors(model):
  """Gives every norm weight a value around 1 and every bias one around 0."""
  with torch.no_grad():
    for name, value in model.named_parameters():
      if value.ndim != 1:
        continue
      center = 0.0 if name.endswith(".bias") else 1.0
      value.copy_(center + 0.3 * torch.randn_like(value))


def round_parameters(model, dtype):
  """Rounds the float32 parameters to what `dtype` holds, buffers apart."""
  with torch.no_grad():
    for value in model.parameters():
      value.copy_(value.to(dtype))


def build(case, seed):
  """Returns a random float32 model of the case."""
  torch.manual_seed(seed)
  config_class = getattr(transformers, case["family"] + "Config")
  model_class = getattr(transformers, case["family"] + "ForCausalLM")
  config = config_class(**case["config"], rope_parameters=dict(case["rope"]))
  model = model_class(config).eval()
  randomize_small_tensors(model)
  return model


def decoder(model):
  """Returns the part of a model that reads text: its layers and final norm."""
  return getattr(model.model, "language_model", model.model)


@contextlib.contextmanager
def layer_outputs(model):
  """Yields a list that each forward pass fills with its layers' outputs.

  The hooks see a decoder layer's output itself, so the last one is taken
  before the final norm, unlike transformers' own hidden_states[-1].
  """
  outputs = []

  def keep(_, __, output):
    outputs.append(output[0] if isinstance(output, tuple) else output)

  hooks = [x.register_forward_hook(keep) for x in decoder(model).layers]
  try:
    yield outputs
  finally:
    for hook in hooks:
      hook.remove()


@torch.no_grad()
def greedy(model, tokens, count):
  """Returns the greedy continuation and its smallest top-2 logit gap."""
  margin = float("inf")
  for _ in range(count):
    logits = model(tokens, use_cache=False).logits[:, -1]
    top = torch.topk(logits, 2, dim=-1)
    margin = min(margin, (top.values[:, 0] - top.values[:, 1]).min().item())
    tokens = torch.cat([tokens, top.indices[:, :1]], dim=1)
  return tokens[:, -count:], margin


@torch.no_grad()
def compute(model, tokens):
  """Returns the golden arrays of `tokens: i64[2, T]`, and the margin."""
  with layer_outputs(model) as states:
    output = model(tokens, use_cache=False, output_hidden_states=True)
  states = torch.stack(states)
  inner = torch.stack(output.hidden_states[1:-1])
  torch.testing.assert_close(states[:-1], inner, rtol=0, atol=0)
  torch.testing.assert_close(
    decoder(model).norm(states[-1]), output.hidden_states[-1], rtol=0, atol=0
  )
  continuation, margin = greedy(model, tokens, NUM_GREEDY)
  arrays = {
    "tokens": tokens.to(torch.int32),
    "logits": output.logits.contiguous(),
    "hidden_states": states.contiguous(),
    "greedy": continuation.to(torch.int32).contiguous(),
  }
  return arrays, margin


def hub_config(config, rope):
  """Returns the config as checkpoints made before transformers 5 spell it."""
  config = dict(config)
  for key in ("rope_parameters", "transformers_version"):
    config.pop(key, None)
  if "dtype" in config:
    config["torch_dtype"] = config.pop("dtype")
  scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
  config["rope_theta"] = rope["rope_theta"]
  plain = scaling["rope_type"] == "default"
  config["rope_scaling"] = None if plain else scaling
  return config


def write_json(path, value):
  """Writes JSON: a line for each key, and for each record of a list."""

  def line(item):
    return json.dumps(item, ensure_ascii=False)

  def records(items, indent):
    lines = ",\n".join(f"{indent}  {line(x)}" for x in items)
    return f"[\n{lines}\n{indent}]"

  def entry(item):
    nested = isinstance(item, list) and item and isinstance(item[0], dict)
    return records(item, "  ") if nested else line(item)

  if isinstance(value, dict):
    pairs = [f"  {line(k)}: {entry(v)}" for k, v in value.items()]
    text = "{\n" + ",\n".join(pairs) + "\n}"
  else:
    text = records(value, "")
  path.write_text(text + "\n", encoding="utf-8")


def write_case(name, out):
  """Writes one case directory and returns the facts about it."""
  case = CASES[name]
  folder = out / name
  if folder.exists():
    shutil.rmtree(folder)
  dtype = getattr(torch, case.get("store", "float32"))
  for seed in range(1000):
    model = build(case, seed)
    round_parameters(model, dtype)
    torch.manual_seed(1000 + seed)
    shape = (2, NUM_TOKENS)
    tokens = torch.randint(3, case["config"]["vocab_size"], shape)
    arrays, margin = compute(model, tokens)
    varied = min(len(set(row.tolist())) for row in arrays["greedy"])
    if margin > MIN_MARGIN and varied >= 8:
      break
  else:
    raise ValueError(f"{name}: no seed keeps its greedy path off ties")
  model.to(dtype).save_pretrained(
    folder, max_shard_size=case.get("shard", "1GB")
  )
  (folder / "generation_config.json").unlink()
  config = json.loads((folder / "config.json").read_text())
  write_json(folder / "config_hub.json", hub_config(config, case["rope"]))
  safetensors.torch.save_file(arrays, folder / "golden.safetensors")
  return {"seed": seed, "margin": margin, "distinct": varied}


def load(folder, config_name="config.json"):
  """Returns the stored model in float32, read with the named config."""
  with tempfile.TemporaryDirectory() as temporary:
    copy = pathlib.Path(temporary) / "model"
    shutil.copytree(folder, copy)
    shutil.copyfile(folder / config_name, copy / "config.json")
    return transformers.AutoModelForCausalLM.from_pretrained(
      copy, dtype=torch.float32
    ).eval()


def check_case(name, out):
  """Recomputes one stored case from its files; raises where it differs."""
  folder = out / name
  golden = safetensors.torch.load_file(folder / "golden.safetensors")
  tokens = golden["tokens"].long()
  worst = 0.0
  for config_name in ("config.json", "config_hub.json"):
    model = load(folder, config_name)
    arrays, margin = compute(model, tokens)
    for key, value in golden.items():
      torch.testing.assert_close(arrays[key], value, rtol=1e-5, atol=1e-5)
      worst = max(worst, (arrays[key] - value).abs().max().item())
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
