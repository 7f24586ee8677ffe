# Copyright 2026 The dflash_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the goldens of DSpark's and Domino's heads, by package specforge.

Random tiny drafters draft one block each: hidden states, base logits, the
logits that the head corrects along given tokens and along its own greedy ones,
and DSpark's confidence. Package speculators must agree about DSpark's heads.
See README.md beside this file.

  python tools/goldens/heads.py --out tests/goldens/heads
  python tools/goldens/heads.py --out tests/goldens/heads --check
"""

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import shutil

import safetensors.torch
import torch
import transformers
from specforge.modeling.draft.domino import DominoDraftModel
from specforge.modeling.draft.dspark import DSparkDraftModel
from targets import write_json

MIN_MARGIN = 2e-3
CONTEXT = 7  # rows before the anchor

_CONFIG = {
  "model_type": "qwen3",
  "vocab_size": 41,
  "hidden_size": 20,
  "intermediate_size": 26,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 8,
  "block_size": 5,
  "num_target_layers": 6,
  "max_position_embeddings": 128,
  "layer_types": ["full_attention", "full_attention"],
  "rms_norm_eps": 1e-6,
  "rope_theta": 5000.0,
  "tie_word_embeddings": False,
}
_NESTED = {"mask_token_id": 2, "target_layer_ids": [1, 4, 2]}


def _dspark(kind, **changes):
  return {
    "architectures": ["DSparkDraftModel"],
    "dflash_config": _NESTED
    | {
      "projector_type": "dspark",
      "markov_rank": 6,
      "markov_head_type": kind,
      "confidence_head_alpha": 1.0,
      "confidence_head_with_markov": True,
    }
    | changes,
  }


def _domino(shift, plain):
  return {
    "architectures": ["DominoDraftModel"],
    "dflash_config": _NESTED
    | {
      "projector_type": "domino",
      "emb_dim": 9,
      "gru_hidden_dim": 14,
      "pure_draft_prefix_len": plain,
      "shift_label": shift,
    },
  }


CASES = {
  "dspark_vanilla": _dspark("vanilla"),
  "dspark_gated": _dspark("gated", confidence_head_with_markov=False),
  "dspark_rnn": _dspark("rnn"),
  "domino": _domino(False, 1),
  "domino_two_plain": _domino(False, 2),
  "domino_shifted": _domino(True, 1),
  "domino_shifted_none_plain": _domino(True, 0),
}


class Target(torch.nn.Module):
  """The tables a drafter borrows, where specforge looks for them."""

  def __init__(self, embedding, head):
    super().__init__()
    self.model = torch.nn.Module()
    self.model.embed_tokens = torch.nn.Embedding.from_pretrained(embedding)
    self.lm_head = torch.nn.Linear(*head.shape[::-1], bias=False)
    self.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)


def load(folder):
  """Returns the stored drafter, in float32."""
  values = json.loads((folder / "config.json").read_text())
  kind = values.pop("architectures")[0]
  config = transformers.Qwen3Config(**values)
  config._attn_implementation = "sdpa"
  classes = {"DSparkDraftModel": DSparkDraftModel}
  drafter = classes.get(kind, DominoDraftModel)(config).eval()
  stored = safetensors.torch.load_file(folder / "model.safetensors")
  drafter.load_state_dict(stored)
  return drafter


def write_drafter(name, folder, seed):
  """Writes a random drafter."""
  write_json(folder / "config.json", _CONFIG | CASES[name])
  values = _CONFIG | {"dflash_config": dict(CASES[name]["dflash_config"])}
  config = transformers.Qwen3Config(**values)
  is_dspark = name.startswith("dspark")
  torch.manual_seed(seed)
  drafter = (DSparkDraftModel if is_dspark else DominoDraftModel)(config)
  with torch.no_grad():
    for value in drafter.parameters():
      value.copy_(0.4 * torch.randn_like(value))
  safetensors.torch.save_file(
    {k: v.contiguous() for k, v in drafter.state_dict().items()},
    folder / "model.safetensors",
    metadata={"format": "pt"},
  )


def draw_inputs(seed):
  """Returns what a block is drafted from: tables, taps and given tokens."""
  torch.manual_seed(seed)
  V, D, K = (_CONFIG[x] for x in ("vocab_size", "hidden_size", "block_size"))
  taps = len(_NESTED["target_layer_ids"])
  return {
    "embedding": torch.randn(V, D),
    "head": torch.randn(V, D),
    "target_hidden": torch.randn(CONTEXT, taps * D),
    "tokens": torch.randint(3, V, (K + 1,), dtype=torch.int32),
  }


@torch.no_grad()
def record(drafter, given):
  """Returns all arrays of a case, or None if a choice is nearly a tie."""
  K, mask = drafter.block_size, drafter.mask_token_id
  target = Target(given["embedding"], given["head"])
  tokens = given["tokens"].long()
  block = torch.full((1, K), mask)
  block[0, 0] = tokens[0]
  hidden = drafter(
    target_hidden=given["target_hidden"][None],
    noise_embedding=target.model.embed_tokens(block),
    position_ids=torch.arange(CONTEXT + K)[None],
    is_causal=False,
  )
  base = target.lm_head(hidden)
  arrays = given | {"draft_hidden": hidden[0], "base_logits": base[0]}
  is_dspark = drafter.projector_type == "dspark"
  follow = follow_dspark if is_dspark else follow_domino
  arrays |= follow(drafter, target, hidden, base, tokens[None])
  top = torch.topk(arrays["greedy_logits"], 2).values
  if (top[:, 0] - top[:, 1]).min() < MIN_MARGIN:
    return None
  return {key: value.contiguous() for key, value in arrays.items()}


def follow_dspark(drafter, target, hidden, base, tokens):
  """Logits and confidence along given tokens, and the head's own greedy."""
  before = tokens[:, :-1]
  logits = drafter.apply_logits_head(
    base, prev_token_ids=before, hidden_states=hidden
  )
  confidence = drafter.predict_confidence(hidden, prev_token_ids=before)
  compare_speculators(drafter, hidden, before, logits - base, confidence)
  greedy, greedy_logits = drafter.markov_head.sample_block_tokens(
    base, first_prev_token_ids=tokens[:, 0], hidden_states=hidden
  )
  return {
    "logits": logits[0],
    "confidence_logits": confidence[0],
    "greedy": greedy[0].int(),
    "greedy_logits": greedy_logits[0],
  }


def compare_speculators(drafter, hidden, before, bias, confidence):
  """Raises unless package speculators says the same of the same weights."""
  files = importlib.metadata.distribution("speculators")
  path = files.locate_file("speculators/models/dspark/model_definitions.py")
  spec = importlib.util.spec_from_file_location("speculators_heads", path)
  heads = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(heads)
  ours = drafter.markov_head
  theirs = heads.MarkovHead(
    verifier_vocab_size=ours.vocab_size,
    draft_vocab_size=ours.vocab_size,
    markov_rank=ours.markov_rank,
    hidden_size=hidden.shape[-1],
    head_type=ours.markov_head_type,
  )
  theirs.load_state_dict(ours.state_dict())
  again = theirs.block_bias(prev_token_ids=before, hidden_states=hidden)
  torch.testing.assert_close(again, bias, rtol=1e-4, atol=1e-4)
  width = drafter.confidence_head.proj.in_features
  head = heads.ConfidenceHead(width)
  head.load_state_dict(drafter.confidence_head.state_dict())
  features = torch.cat([hidden, theirs.prev_embeddings(before)], dim=-1)
  torch.testing.assert_close(head(features[..., :width]), confidence)


def follow_domino(drafter, target, hidden, base, tokens):
  """Logits along given tokens, and the head's own greedy ones."""
  start = 0 if drafter.shift_label else 1
  K = drafter.block_size

  def correct(block):
    final = drafter.apply_logits_head(
      base[:, None],
      prev_token_embeddings=target.model.embed_tokens(block)[:, None],
      hidden_states=hidden[:, None],
    )
    return final[0, 0, start:]

  block = torch.full((1, K), drafter.mask_token_id)
  block[0, 0] = tokens[0, 0]
  greedy = drafter._sample_draft_tokens(target, hidden, block)
  chain = torch.cat([tokens[:, :1], greedy], dim=1)
  greedy_logits = correct(chain)
  return {
    "logits": correct(tokens[:, :K]),
    "greedy": greedy_logits.argmax(-1).int(),
    "greedy_logits": greedy_logits,
  }


def write_case(name, out):
  """Writes one case directory."""
  folder = out / name
  if folder.exists():
    shutil.rmtree(folder)
  folder.mkdir(parents=True)
  for seed in range(50):
    write_drafter(name, folder, 100 + seed)
    arrays = record(load(folder), draw_inputs(200 + seed))
    if arrays is not None:
      safetensors.torch.save_file(arrays, folder / "golden.safetensors")
      return seed
  raise ValueError(f"{name}: every seed is nearly a tie")


def check_case(name, out):
  """Recomputes one stored case from its files; raises where it differs."""
  folder = out / name
  stored = safetensors.torch.load_file(folder / "golden.safetensors")
  given = {key: stored[key] for key in draw_inputs(0)}
  again = record(load(folder), given)
  for key, value in stored.items():
    torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-5)
  return "same"


def main():
  """Entry point."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--check", action="store_true")
  values = parser.parse_args()
  torch.set_num_threads(1)
  for name in CASES:
    work = check_case if values.check else write_case
    print(name, work(name, values.out))


if __name__ == "__main__":
  main()
