# Copyright 2026 The dflash_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the drafter goldens: tiny drafters run by the package dflash.

The drafters are overfitted on the greedy continuations of tiny random
targets until some, but not all, of their drafts are accepted. Then the
package's own decode loop runs, and hooks record what went through it. See
README.md beside this file.

  python tools/goldens/drafter.py --out tests/goldens/drafter
  python tools/goldens/drafter.py --out tests/goldens/drafter --check
"""

import argparse
import itertools
import json
import pathlib
import shutil
import tempfile
import time
import types

import dflash.model
import safetensors.torch
import torch
import transformers
from targets import build, randomize_small_tensors, write_json
from targets import greedy as greedy_continuation

MIN_MARGIN = 2e-3
WALK_TEMPERATURE = 0.8  # of a selector's sampled walk
MASK_TOKEN = 3
FIRST_TOKEN = 4  # prompts use ids from here on
TRAIN_LENGTH = 72  # tokens of each training sequence, prompt included

_TARGETS = {
  "qwen3": {
    "family": "Qwen3",
    "rope": {"rope_type": "default", "rope_theta": 10000.0},
    "config": {
      "vocab_size": 53,
      "hidden_size": 32,
      "intermediate_size": 28,
      "num_hidden_layers": 6,
      "num_attention_heads": 4,
      "num_key_value_heads": 2,
      "head_dim": 12,
      "max_position_embeddings": 256,
      "initializer_range": 0.25,
      "tie_word_embeddings": False,
    },
  },
  "llama": {
    "family": "Llama",
    "rope": {"rope_type": "default", "rope_theta": 5000.0},
    "config": {
      "vocab_size": 47,
      "hidden_size": 30,
      "intermediate_size": 26,
      "num_hidden_layers": 5,
      "num_attention_heads": 6,
      "num_key_value_heads": 2,
      "head_dim": 8,
      "max_position_embeddings": 256,
      "rms_norm_eps": 1e-5,
      "initializer_range": 0.25,
      "tie_word_embeddings": True,
    },
  },
}

_DRAFTER = {
  "architectures": ["DFlashDraftModel"],
  "model_type": "qwen3",
  "attention_bias": False,
  "attention_dropout": 0.0,
  "hidden_act": "silu",
  "intermediate_size": 44,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "head_dim": 12,
  "initializer_range": 0.02,
  "rms_norm_eps": 1e-6,
  "rope_scaling": None,
  "tie_word_embeddings": False,
  "use_sliding_window": False,
  "sliding_window": None,
  "torch_dtype": "float32",
}
_NESTED = {
  "block_size": 7,
  "mask_token_id": MASK_TOKEN,
  "target_layer_ids": [0, 2, 4],
}

# top: config keys over _DRAFTER. nested: dflash_config, or None to leave it
# out. drafter: another case whose drafter is used. stop: how the stop token
# is chosen. sequences: how many training sequences. steps: Adam steps.
CASES = {
  "plain": {"target": "qwen3", "nested": _NESTED},
  "options": {
    "target": "qwen3",
    "nested": _NESTED
    | {
      "target_layer_ids": [4, 1],
      "input_embedding_scale": 2.5,
      "output_multiplier": 0.75,
      "final_logit_softcapping": 4.0,
    },
  },
  "sliding": {
    "target": "qwen3",
    "top": {
      "layer_types": ["sliding_attention", "full_attention"],
      "sliding_window": 5,
      "use_sliding_window": True,
      "max_window_layers": 2,
    },
    "nested": _NESTED,
  },
  "sliding_bidirectional": {
    "target": "qwen3",
    "top": {
      "layer_types": ["full_attention", "sliding_attention"],
      "sliding_window": 4,
      "use_sliding_window": True,
      "max_window_layers": 2,
      "is_causal": False,
    },
    "nested": _NESTED,
  },
  "causal": {
    "target": "qwen3",
    "top": {"is_causal": True, "num_hidden_layers": 3},
    "nested": {"block_size": 6, "mask_token_id": MASK_TOKEN},
  },
  "flat_config": {
    "target": "qwen3",
    "top": {
      "block_size": 5,
      "mask_token_id": MASK_TOKEN,
      "target_layer_ids": [1, 3],
      "input_embedding_scale": 1.5,
    },
    "nested": None,
  },
  "llama_target": {
    "target": "llama",
    "top": {
      "block_size": 4,
      "num_attention_heads": 5,
      "num_key_value_heads": 1,
      "head_dim": 10,
    },
    "nested": {"mask_token_id": MASK_TOKEN, "target_layer_ids": [1, 3]},
  },
  "stop": {"target": "qwen3", "drafter": "plain", "stop": True},
  "dflash2": {
    "target": "qwen3",
    "top": {
      "architectures": ["DFlash2DraftModel"],
      "layer_types": ["sliding_attention", "full_attention"],
      "sliding_window": 9,
      "use_sliding_window": True,
      "max_window_layers": 2,
      "is_causal": False,
    },
    "nested": _NESTED
    | {
      "conv_kernel_size": 2,
      "conv_group_size": 4,
      "selector_rank": 6,
      "selector_top_k": 5,
    },
  },
  "dflash2_causal": {
    "target": "qwen3",
    "top": {"architectures": ["DFlash2DraftModel"], "is_causal": True},
    "nested": _NESTED
    | {
      "final_logit_softcapping": 9.0,
      "conv_kernel_size": 3,
      "conv_group_size": 16,
      "selector_rank": 3,
      "selector_top_k": 7,
    },
  },
}


def drafter_config(case):
  """Returns config.json of the case's drafter in the published layout."""
  target = _TARGETS[case["target"]]
  config = _DRAFTER | {
    "hidden_size": target["config"]["hidden_size"],
    "vocab_size": target["config"]["vocab_size"],
    "num_target_layers": target["config"]["num_hidden_layers"],
    "max_position_embeddings": target["config"]["max_position_embeddings"],
    "rope_theta": target["rope"]["rope_theta"],
  }
  config = config | case.get("top", {})
  config.setdefault(
    "layer_types", ["full_attention"] * config["num_hidden_layers"]
  )
  if case["nested"] is not None:
    config["dflash_config"] = case["nested"]
  return config


def load_target(folder):
  """Returns the stored target in float32."""
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()


def drafter_class(folder):
  """Returns the package's class for the drafter stored there."""
  config = json.loads((folder / "config.json").read_text())
  return getattr(dflash.model, config["architectures"][0])


def load_drafter(folder):
  """Returns the stored drafter in float32, read by the package dflash."""
  return (
    drafter_class(folder)
    .from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    .eval()
  )


def write_target(name, folder):
  """Writes a random target whose greedy text is neither tied nor short.

  Returns the training sequences `i64[N, T]`, prompt first, and each one's
  prompt length.
  """
  case = _TARGETS[name]
  best = None
  for seed in range(12):
    model = build(case, 500 + seed)
    torch.manual_seed(900 + seed)
    shape = (12, 11)
    prompts = torch.randint(FIRST_TOKEN, case["config"]["vocab_size"], shape)
    count = TRAIN_LENGTH - prompts.shape[1]
    tails, _ = greedy_continuation(model, prompts, count)
    varied = sum(len(set(itertools.pairwise(x))) for x in tails.tolist())
    if best is None or varied > best[0]:
      best = (varied, model, torch.cat([prompts, tails], dim=1))
  _, model, sequences = best
  if folder.exists():
    shutil.rmtree(folder)
  model.save_pretrained(folder)
  (folder / "generation_config.json").unlink()
  return sequences


def train(drafter, target, sequences, steps, rate=4e-3):
  """Overfits the drafter on the sequences, anchors drawn at random."""
  with torch.no_grad():
    output = target(sequences, use_cache=False, output_hidden_states=True)
    features = dflash.model.extract_context_feature(
      output.hidden_states, drafter.target_layer_ids
    )
  size = drafter.block_size
  value = dflash.model._draft_value
  scale = float(value(drafter.config, "input_embedding_scale", 1.0))
  table = target.get_input_embeddings().weight.detach()
  optimizer = torch.optim.Adam(drafter.parameters(), lr=rate)
  for parameter in target.parameters():
    parameter.requires_grad_(False)
  for _ in range(steps):
    anchor = int(torch.randint(8, sequences.shape[1] - size + 1, ()))
    block = torch.full((len(sequences), size), drafter.mask_token_id)
    block[:, 0] = sequences[:, anchor]
    hidden = drafter(
      target_hidden=features[:, :anchor],
      noise_embedding=table[block] * scale,
      position_ids=torch.arange(anchor + size)[None],
    )
    logits = drafter.compute_logits(hidden[:, 1:], target.lm_head)
    labels = sequences[:, anchor + 1 : anchor + size]
    loss = torch.nn.functional.cross_entropy(
      logits.flatten(0, 1), labels.flatten()
    )
    if hasattr(drafter, "candidate_selector"):
      before = sequences[:, anchor : anchor + size - 1]
      candidates, scores = score_path(drafter, hidden[:, 1:], logits, before)
      chosen = candidates == labels[..., None]
      missed = scores.logsumexp(-1) - (scores * chosen).sum(-1)
      loss = loss + (missed * chosen.any(-1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def score_path(drafter, hidden, logits, before):
  """Returns a selector's candidates, likeliest first, and their scores.

  Each slot `[B, K - 1]` is scored given the token before it.
  """
  selector = drafter.candidate_selector
  unary, candidates = torch.topk(logits, selector.top_k, dim=-1)
  asked = selector.predecessor_codebook(before)
  asked = asked * selector.hidden_projection(hidden)
  pairs = selector.successor_codebook(candidates)
  return candidates, unary + torch.einsum("bkr,bkcr->bkc", asked, pairs)


def record_selector(drafter, entry):
  """Adds what the selector said on its way through a round's block."""
  hidden = entry["draft_hidden"][:, 1:]
  logits, block = entry["draft_logits"], entry["block"]
  entry["candidates"], entry["scores"] = score_path(
    drafter, hidden, logits, block[:, :-1]
  )
  torch.manual_seed(len(block))
  path, candidates, probs = drafter.candidate_selector.select(
    hidden, logits, block[:, 0], WALK_TEMPERATURE
  )
  order = candidates.argsort(-1)
  entry["walk"] = path
  entry["walk_candidates"] = candidates.gather(-1, order)
  entry["walk_probs"] = probs.gather(-1, order)


def write_drafter(name, case, folder, target, sequences, steps):
  """Trains the case's drafter for `steps` and writes its HF directory."""
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / "config.json", drafter_config(case))
  config = transformers.AutoConfig.from_pretrained(folder)
  torch.manual_seed(sum(name.encode()))
  drafter = drafter_class(folder)(config)
  with torch.no_grad():
    for key, value in drafter.named_parameters():
      value.copy_(0.15 * torch.randn_like(value))
      if key.endswith("base_kernel"):
        value[:, 0] += 1.0
  randomize_small_tensors(drafter)
  train(drafter, target, sequences, steps)
  with tempfile.TemporaryDirectory() as temporary:
    drafter.save_pretrained(temporary)
    saved = (pathlib.Path(temporary) / "config.json").read_text()
  write_json(folder / "config_saved.json", json.loads(saved))
  safetensors.torch.save_file(
    {
      k.replace("_codebook.weight", "_codebook"): v.contiguous()
      for k, v in drafter.state_dict().items()
    },
    folder / "model.safetensors",
    metadata={"format": "pt"},
  )


def record_decode(
  drafter, target, prompt, max_new_tokens, stop_tokens, block_size=None
):
  """Runs the package's greedy decode; returns its result and all rounds.

  A round is a dict of what went into and came out of the drafter and the
  target in that round, in the order of the loop.
  """
  rounds = []
  contexts = []
  passes = []

  def drafted(_, __, inputs, output):
    kept = ("target_hidden", "noise_embedding", "position_ids")
    entry = {k: inputs[k].clone() for k in kept}
    entry["context"] = contexts.pop()
    entry["draft_hidden"] = output.clone()
    rounds.append(entry)

  def verified(_, inputs, __, output):
    passes.append((inputs[0].clone(), output.logits.clone()))

  compute_logits = drafter.compute_logits

  def logits_kept(self, hidden, head):
    logits = compute_logits(hidden, head)
    rounds[-1]["draft_logits"] = logits.clone()
    return logits

  def fused(_, __, output):
    contexts.append(output.clone())

  hooks = [
    drafter.hidden_norm.register_forward_hook(fused),
    drafter.register_forward_hook(drafted, with_kwargs=True),
    target.register_forward_hook(verified, with_kwargs=True),
  ]
  drafter.compute_logits = types.MethodType(logits_kept, drafter)
  dflash.model._cuda_time = time.perf_counter  # it would need a GPU
  try:
    result = dflash.model.dflash_generate(
      drafter,
      target,
      prompt,
      max_new_tokens,
      stop_tokens,
      temperature=0.0,
      block_size=block_size,
      return_stats=True,
    )
  finally:
    del drafter.compute_logits
    for hook in hooks:
      hook.remove()
  for entry, (block, logits) in zip(rounds, passes[1:], strict=True):
    entry["block"] = block
    entry["target_logits"] = logits
    if hasattr(drafter, "candidate_selector"):
      with torch.no_grad():
        record_selector(drafter, entry)
  return result, passes[0], rounds


def margin(logits):
  """Returns the smallest gap between the two largest logits of any row."""
  top = torch.topk(logits, 2, dim=-1).values
  return (top[..., 0] - top[..., 1]).min().item()


def draft_margin(entry):
  """Returns the smallest gap that decides a round's drafts."""
  if "scores" not in entry:
    return margin(entry["draft_logits"])
  ranked = entry["draft_logits"].sort(-1, descending=True).values
  k = entry["scores"].shape[-1]
  last = (ranked[..., k - 1] - ranked[..., k]).min().item()
  return min(margin(entry["scores"]), last)


def summarize(result, first, rounds, prompt, settings):
  """Returns (golden.safetensors arrays, golden.json value) of a decode."""
  start = result.num_input_tokens
  log = []
  for entry, produced in zip(rounds, result.acceptance_lengths, strict=True):
    block = entry["block"][0]
    posterior = entry["target_logits"][0].argmax(-1)
    agree = (block[1:] == posterior[:-1]).int().cumprod(0)
    log.append(
      {
        "start": start,
        "size": len(block),
        "block": block.tolist(),
        "target_argmax": posterior.tolist(),
        "accepted_drafts": int(agree.sum()),
        "emitted": produced,
        "context_rows": entry["target_hidden"].shape[1],
        "first_position": int(entry["position_ids"][0, 0]),
      }
    )
    start += produced
  arrays = {"prompt": prompt[0].to(torch.int32)}
  kept = ("target_hidden", "context", "noise_embedding", "draft_hidden")
  for label, entry in (
    ("first", rounds[0]),
    ("second", rounds[1]),
    ("last", rounds[-1]),
  ):
    for key in (*kept, "draft_logits", "target_logits"):
      arrays[f"{label}.{key}"] = entry[key][0].clone()
    for key in {"scores", "walk_probs"} & entry.keys():
      arrays[f"{label}.{key}"] = entry[key][0].clone()
    whole = {"candidates", "walk", "walk_candidates"} & entry.keys()
    for key in {"position_ids", "block"} | whole:
      arrays[f"{label}.{key}"] = entry[key][0].to(torch.int32).clone()
  arrays["prefill_logits"] = first[1][0, -1].clone()
  golden = settings | {
    "prompt": prompt[0].tolist(),
    "output": result.output_ids[0].tolist(),
    "new_tokens": result.output_ids[0, prompt.shape[1] :].tolist(),
    "acceptance_lengths": result.acceptance_lengths,
    "min_target_margin": min(
      [margin(first[1])] + [margin(x["target_logits"]) for x in rounds]
    ),
    "min_draft_margin": min(draft_margin(x) for x in rounds),
    "rounds": log,
  }
  return arrays, golden


def decode_case(folder, settings, prompts):
  """Yields (prompt, arrays, golden value) as the stored models decode."""
  target = load_target(folder / settings["target"])
  drafter = load_drafter(folder / settings["drafter"])
  settings = settings | {
    "block_size": drafter.block_size,
    "mask_token_id": drafter.mask_token_id,
    "target_layer_ids": list(drafter.target_layer_ids),
  }
  for prompt in prompts:
    result, first, rounds = record_decode(
      drafter,
      target,
      prompt,
      settings["max_new_tokens"],
      settings["stop_token_ids"],
    )
    yield prompt, *summarize(result, first, rounds, prompt, settings)


def quality(golden):
  """Returns how well a decode covers the cases, or None if it is no use."""
  lengths = golden["acceptance_lengths"]
  margins = (golden["min_target_margin"], golden["min_draft_margin"])
  if min(margins) < MIN_MARGIN or len(lengths) < 6:
    return None
  size = golden["block_size"]
  full = size in lengths
  shrunk = golden["rounds"][-1]["size"] < size
  spread = len(set(lengths))
  if spread < 3 or not full or not shrunk or 1 not in lengths:
    return None
  repeats = sum(a == b for a, b in itertools.pairwise(lengths))
  useful = sum(lengths) >= 2 * len(lengths)
  return (useful, spread, -repeats)


def prompts_of(sequences):
  """Yields prompts: some the drafter was trained on, some slightly off."""
  for index in range(len(sequences)):
    for length in (11, 14, 17):
      prompt = sequences[index : index + 1, :length]
      yield prompt
      changed = prompt.clone()
      changed[0, length // 2] = FIRST_TOKEN + (7 * index + length) % 31
      yield changed


def write_case(name, out, sequences, limit=53):
  """Writes one case directory and returns the facts about it."""
  case = CASES[name]
  folder = out / name
  if folder.exists():
    shutil.rmtree(folder)
  folder.mkdir(parents=True)
  settings = {
    "target": f"../targets/{case['target']}",
    "drafter": f"../{case['drafter']}" if "drafter" in case else ".",
    "max_new_tokens": limit,
    "stop_token_ids": None,
  }
  target = load_target(folder / settings["target"])
  choices = []
  for steps in (0,) if "drafter" in case else (600, 1200, 2400):
    if "drafter" not in case:
      write_drafter(name, case, folder, target, sequences, steps)
    prompts = prompts_of(sequences)
    for prompt, arrays, golden in decode_case(folder, settings, prompts):
      score = quality(golden)
      if score is not None:
        choices.append((score, prompt, arrays, golden))
    if choices:
      break
  else:
    raise ValueError(f"{name}: no prompt gives a varied acceptance")
  _, prompt, arrays, golden = max(choices, key=lambda x: x[0])
  if case.get("stop"):
    arrays, golden = stop_inside(folder, settings, prompt, golden)
  safetensors.torch.save_file(arrays, folder / "golden.safetensors")
  settings["stop_token_ids"] = golden["stop_token_ids"]
  golden["variants"] = vary(folder, settings, golden)
  write_json(folder / "golden.json", golden)
  return facts(golden) | {"steps": steps}


def stop_inside(folder, settings, prompt, golden):
  """Decodes again with a stop token that falls inside an accepted run."""
  for index, entry in enumerate(golden["rounds"]):
    emitted = golden["output"][entry["start"] + 1 :][: entry["emitted"]]
    before = golden["new_tokens"][: entry["start"] + 1 - prompt.shape[1]]
    inside = [x for x in emitted[1:-1] if x not in before + emitted[:1]]
    if index >= 2 and inside:
      idle = next(x for x in range(53) if x not in golden["output"])
      settings = settings | {"stop_token_ids": [idle, inside[0]]}
      _, *found = next(decode_case(folder, settings, [prompt]))
      return found
  raise ValueError("no token is new inside an accepted run")


def vary(folder, settings, golden):
  """Returns short records of the same prompt decoded in other ways.

  Small budgets, a budget that ends with a full block, a first token that
  stops, and other block sizes; those whose drafts are near ties left out.
  """
  target = load_target(folder / settings["target"])
  drafter = load_drafter(folder / settings["drafter"])
  prompt = torch.tensor([golden["prompt"]])
  size, stop = golden["block_size"], settings["stop_token_ids"]
  limit = settings["max_new_tokens"]
  fits = 1 + sum(golden["acceptance_lengths"][:2])
  ways = [(x, stop, size) for x in (1, 2, 3, fits, fits + 1)]
  ways += [(limit, golden["new_tokens"][:1], size)]
  ways += [(limit, stop, 2), (limit, stop, size - 1), (limit, stop, size + 4)]
  records = []
  for count, tokens, block in ways:
    result, first, rounds = record_decode(
      drafter, target, prompt, count, tokens, block
    )
    seen = [first[1]] + [x["target_logits"] for x in rounds]
    margins = [margin(x) for x in seen] + [draft_margin(x) for x in rounds]
    if min(margins) > MIN_MARGIN:
      records.append(
        {
          "max_new_tokens": count,
          "stop_token_ids": tokens,
          "block_size": block,
          "new_tokens": result.output_ids[0, prompt.shape[1] :].tolist(),
          "acceptance_lengths": result.acceptance_lengths,
        }
      )
  return records


def facts(golden):
  """Returns the part of a golden value worth a line of output."""
  keys = (
    "block_size",
    "target_layer_ids",
    "acceptance_lengths",
    "min_target_margin",
    "min_draft_margin",
  )
  count = len(golden.get("variants", []))
  return {key: golden[key] for key in keys} | {"variants": count}


def check_case(name, out):
  """Recomputes one stored case from its files; raises where it differs."""
  folder = out / name
  stored = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
  arrays = safetensors.torch.load_file(folder / "golden.safetensors")
  keys = ("target", "drafter", "max_new_tokens", "stop_token_ids")
  prompt = torch.tensor([stored["prompt"]])
  settings = {key: stored[key] for key in keys}
  _, again, golden = next(decode_case(folder, settings, [prompt]))
  golden["variants"] = vary(folder, settings, golden)
  if arrays.keys() != again.keys():
    raise ValueError(f"{name}: other arrays than stored")
  worst = 0.0
  for key, value in arrays.items():
    torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-5)
    worst = max(worst, (again[key] - value).abs().max().item())
  for key in stored.keys() - {"min_target_margin", "min_draft_margin"}:
    if stored[key] != golden[key]:
      raise ValueError(f"{name}: {key} differs")
  target = load_target(folder / stored["target"])
  count = len(stored["new_tokens"])
  plain, _ = greedy_continuation(target, prompt, count)
  if plain[0].tolist() != stored["new_tokens"]:
    raise ValueError(f"{name}: not the tokens of plain greedy decoding")
  return facts(golden) | {"difference": worst}


def main():
  """Writes all cases, or checks those named on the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--case", action="append", choices=sorted(CASES))
  parser.add_argument("--check", action="store_true")
  args = parser.parse_args()
  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  names = args.case or list(CASES)
  if args.check:
    for name in names:
      print(name, json.dumps(check_case(name, args.out)), flush=True)
    return
  sequences = {
    name: write_target(name, args.out / "targets" / name)
    for name in sorted({CASES[x]["target"] for x in names})
  }
  for name in names:
    made = write_case(name, args.out, sequences[CASES[name]["target"]])
    print(name, json.dumps(made), flush=True)


if __name__ == "__main__":
  main()
