# Copyright 2026 The dflash_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the EAGLE-3 goldens: tiny random drafters run by speculators.

The package's training forward unrolls the layer from every position, with the
true tokens: step s of row t is the s-th draft of a chain that begins there. A
hook on its head keeps the logits. See README.md beside this file.

  python tools/goldens/eagle3.py --out tests/goldens/eagle3
  python tools/goldens/eagle3.py --out tests/goldens/eagle3 --check
"""

import argparse
import json
import pathlib
import shutil
import tempfile

import safetensors.torch
import torch
import transformers
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig

NUM_TOKENS = 17
STEPS = 4
VOCABULARY = 53
TAPS = (2, 4, 6)  # as published: the layer that each enters
SCALE = 0.25  # of random matrices

_LAYER = {
  "vocab_size": VOCABULARY,
  "hidden_size": 24,
  "intermediate_size": 34,
  "num_hidden_layers": 1,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 10,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5,
  "attention_bias": False,
  "mlp_bias": False,
}
_LLAMA3 = {
  "rope_type": "llama3",
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
# Case: draft vocabulary, norm_before_residual, scaling, layout.
CASES = {
  "speculators": (VOCABULARY, True, None, "speculators"),
  "speculators_reduced": (31, True, None, "speculators"),
  "flat": (29, False, _LLAMA3, "flat"),
}


def build(
  draft_vocabulary: int, norm_before_residual: bool, scaling: dict | None
) -> Eagle3DraftModel:
  """A drafter with random weights everywhere, norms and maps included."""
  rope = {"rope_theta": 500.0, **(scaling or {"rope_type": "default"})}
  layer = transformers.LlamaConfig(**_LAYER, rope_parameters=rope)
  layer._attn_implementation = "eager"
  config = Eagle3SpeculatorConfig(
    transformer_layer_config=layer,
    draft_vocab_size=draft_vocabulary,
    norm_before_residual=norm_before_residual,
    eagle_aux_hidden_state_layer_ids=list(TAPS),
    speculators_config=SpeculatorsConfig(
      algorithm="eagle3",
      proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
      default_proposal_method="greedy",
      verifier=VerifierConfig(
        name_or_path=None, architectures=["LlamaForCausalLM"]
      ),
    ),
  )
  model = Eagle3DraftModel(config).float().eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.ndim == 1:
        parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
      else:
        scale = 1.0 if "embed" in name else SCALE
        parameter.copy_(scale * torch.randn_like(parameter))
    if draft_vocabulary < VOCABULARY:
      kept = torch.randperm(VOCABULARY)[:draft_vocabulary].sort().values
      model.d2t.copy_(kept - torch.arange(draft_vocabulary))
      model.t2d[kept] = True
  return model


def run(model: Eagle3DraftModel) -> dict[str, torch.Tensor]:
  """Tokens, taps, and the logits of every step at every row."""
  tokens = torch.randint(VOCABULARY, (1, NUM_TOKENS))
  taps = torch.randn(1, NUM_TOKENS, len(TAPS) * _LAYER["hidden_size"])
  kept = []
  hook = model.lm_head.register_forward_hook(
    lambda module, inputs, output: kept.append(output[0].clone())
  )
  following = torch.cat([tokens[:, 1:], tokens.new_zeros(1, 1)], dim=1)
  with torch.no_grad():
    model(taps, following, torch.zeros_like(tokens), ttt_steps=STEPS)
  hook.remove()
  return {
    "tokens": tokens[0].int(),
    "taps": taps[0],
    "logits": torch.stack(kept),
    "embedding": model.embed_tokens.weight.detach().clone(),
  }


def write_flat(model: Eagle3DraftModel, directory: pathlib.Path) -> None:
  """The layout of EAGLE-3's own release, which borrows the embedding."""
  left = ("embed_tokens.", "verifier_")
  tensors = {
    name.replace("layers.0.", "midlayer."): tensor.contiguous()
    for name, tensor in model.state_dict().items()
    if not name.startswith(left)
  }
  layer = model.config.transformer_layer_config
  rope = dict(layer.rope_parameters)
  fields = {
    **_LAYER,
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rope_theta": rope.pop("rope_theta"),
    "rope_scaling": rope,
    "draft_vocab_size": model.config.draft_vocab_size,
    "eagle_config": {
      "eagle_aux_hidden_state_layer_ids": list(TAPS),
      "use_aux_hidden_state": True,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
  }
  directory.mkdir(parents=True, exist_ok=True)
  text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
  (directory / "config.json").write_text(text)
  safetensors.torch.save_file(
    tensors, directory / "model.safetensors", metadata={"format": "pt"}
  )


def write(out: pathlib.Path) -> None:
  """All cases."""
  torch.set_num_threads(1)
  for seed, (case, (vocabulary, normed, scaling, layout)) in enumerate(
    CASES.items()
  ):
    torch.manual_seed(seed)
    model = build(vocabulary, normed, scaling)
    directory = out / case
    if layout == "flat":
      write_flat(model, directory)
    else:
      model.save_pretrained(directory)
      for code in directory.glob("*.py"):  # its own, which it copies there
        code.unlink()
    safetensors.torch.save_file(run(model), directory / "golden.safetensors")
    for path in directory.iterdir():
      path.chmod(0o644)


def main() -> None:
  """Writes, or compares with what is there."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--check", action="store_true")
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as made:
    fresh = pathlib.Path(made) / "eagle3"
    write(fresh)
    if not flags.check:
      shutil.rmtree(flags.out, ignore_errors=True)
      shutil.copytree(fresh, flags.out)
      return
    for path in sorted(fresh.rglob("*.safetensors")):
      old = safetensors.torch.load_file(flags.out / path.relative_to(fresh))
      for name, tensor in safetensors.torch.load_file(path).items():
        torch.testing.assert_close(tensor, old[name])
  print("the stored goldens are these")


if __name__ == "__main__":
  main()
