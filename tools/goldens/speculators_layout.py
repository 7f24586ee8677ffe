# Copyright 2026 The dflash_jax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Writes the goldens of the speculators layout, by the package itself.

Tiny random drafters of the four kinds, saved by its save_pretrained, and what
its training forward makes of a few blocks. See README.md beside this file.

  python tools/goldens/speculators_layout.py --out tests/goldens/speculators

With --check it compares with what is there; with --load=DIR it reads drafters
that others wrote, in directories named as the cases, and compares what they do.
"""

import argparse
import contextlib
import pathlib
import shutil
import tempfile

import eagle3
import safetensors.torch
import torch
import transformers
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
from speculators.models.dflash2 import (
  DFlash2DraftModel,
  DFlash2SpeculatorConfig,
)
from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig

VERIFIER = "verifier"  # beside the drafters, which name it so
NUM_TOKENS = 23
ANCHORS = (6, 13)
SCALE = 0.25  # of random matrices
VOCABULARY = eagle3.VOCABULARY
WIDTH = eagle3._LAYER["hidden_size"]

_KINDS = {
  "dflash": (DFlashDraftModel, DFlashSpeculatorConfig),
  "dflash2": (DFlash2DraftModel, DFlash2SpeculatorConfig),
  "dspark": (DSparkDraftModel, DSparkSpeculatorConfig),
}
_LAYER = {
  "vocab_size": VOCABULARY,
  "hidden_size": WIDTH,
  "intermediate_size": 34,
  "num_hidden_layers": 2,
  "num_attention_heads": 6,
  "num_key_value_heads": 2,
  "head_dim": 10,
  "max_position_embeddings": 128,
  "rms_norm_eps": 1e-5,
  "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
  "layer_types": ["full_attention", "full_attention"],
}
_VERIFIER = {
  "intermediate_size": 10,
  "num_hidden_layers": 8,
  "num_attention_heads": 2,
  "num_key_value_heads": 1,
  "layer_types": None,
}
# No window is so short that it would bite: where the package trains with the
# last W tokens before an anchor, engines give each slot the last W of its own.
_SLIDES = {
  "use_sliding_window": True,
  "sliding_window": 64,
  "layer_types": ["sliding_attention", "full_attention"],
}
# Case: kind, changes of the layers, of the config; dtype in the file.
CASES = {
  "dflash": ("dflash", {}, {}, torch.float32),
  "dflash_reduced": (
    "dflash",
    _SLIDES | {"rope_parameters": {"rope_theta": 500.0, **eagle3._LLAMA3}},
    {"draft_vocab_size": 31},
    torch.float32,
  ),
  "dflash_anchor": (
    "dflash",
    _SLIDES,
    {"sample_from_anchor": True, "sliding_window_non_causal": True},
    torch.bfloat16,
  ),
  "dflash2": (
    "dflash2",
    _SLIDES,
    {
      "conv_kernel_size": 3,
      "conv_group_size": 4,
      "selector_rank": 7,
      "selector_top_k": 5,
    },
    torch.float32,
  ),
  "dspark": (
    "dspark",
    {},
    {"draft_vocab_size": 29, "markov_rank": 6, "markov_head_type": "gated"},
    torch.bfloat16,
  ),
  "dspark_rnn": (
    "dspark",
    _SLIDES,
    {"markov_rank": 5, "markov_head_type": "rnn"},
    torch.float32,
  ),
  "dspark_bonus": (
    "dspark",
    {},
    {
      "sample_from_anchor": False,
      "markov_rank": 5,
      "confidence_head_with_markov": False,
    },
    torch.float32,
  ),
}
BLOCK = 5
TAPS = (1, 5, 3)  # the layers that they enter


def randomise(model: torch.nn.Module, kept: tuple[str, ...] = ()) -> None:
  """Random weights everywhere, norms included."""
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if name.startswith(kept):
        continue
      noise = torch.randn_like(parameter)
      if name.endswith("base_kernel"):
        parameter.copy_(parameter + SCALE * noise)
      elif parameter.ndim == 1:
        parameter.copy_(1 + 0.3 * noise)
      else:
        wide = "embed" in name or "markov" in name or "codebook" in name
        parameter.copy_((1.0 if wide else SCALE) * noise)


def write_verifier(directory: pathlib.Path) -> None:
  """The target that all drafters name."""
  torch.manual_seed(100)
  config = transformers.Qwen3Config(
    **_LAYER | _VERIFIER, tie_word_embeddings=False
  )
  model = transformers.Qwen3ForCausalLM(config)
  randomise(model)
  model.bfloat16().save_pretrained(directory)


def pairing(algorithm: str, drafts: int) -> SpeculatorsConfig:
  """What the config says of serving."""
  return SpeculatorsConfig(
    algorithm=algorithm,
    proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=drafts)],
    default_proposal_method="greedy",
    verifier=VerifierConfig.from_pretrained(VERIFIER),
  )


def build(kind: str, layer: dict, changes: dict) -> DFlashDraftModel:
  """A drafter of the block family between the verifier's tables."""
  model_class, config_class = _KINDS[kind]
  anchored = changes.get("sample_from_anchor", kind == "dspark")
  config = config_class(
    transformer_layer_config=transformers.Qwen3Config(**_LAYER | layer),
    block_size=BLOCK,
    mask_token_id=2,
    aux_hidden_state_layer_ids=list(TAPS),
    speculators_config=pairing(kind, BLOCK if anchored else BLOCK - 1),
    **{"draft_vocab_size": VOCABULARY} | changes,
  )
  config.transformer_layer_config._attn_implementation = "eager"
  model = model_class(config).float().eval()
  randomise(model, ("embed_tokens", "lm_head", "verifier_"))
  if (size := config.draft_vocab_size) < VOCABULARY:
    kept = torch.randperm(VOCABULARY)[:size].sort().values
    t2d = torch.zeros(VOCABULARY, dtype=torch.bool)
    t2d[kept] = True
    model.load_vocab_mappings(t2d, kept - torch.arange(size))
  model.load_verifier_weights()
  return model


def build_eagle3() -> torch.nn.Module:
  """An EAGLE-3 drafter with an embedding of its own."""
  model = eagle3.build(31, True, None)
  model.config.speculators_config = pairing("eagle3", eagle3.STEPS)
  return model


def load(directory: pathlib.Path) -> torch.nn.Module:
  """A drafter as the package reads it, in float32."""
  config = SpeculatorModelConfig.from_pretrained(directory)
  config.transformer_layer_config._attn_implementation = "eager"
  model = SpeculatorModel.from_pretrained(
    directory, config=config, dtype=torch.float32
  )
  return model.eval()


def draw_inputs() -> dict[str, torch.Tensor]:
  """A text and its taps."""
  return {
    "tokens": torch.randint(VOCABULARY, (NUM_TOKENS,)).int(),
    "taps": torch.randn(NUM_TOKENS, len(TAPS) * WIDTH),
  }


@torch.no_grad()
def run(
  model: DFlashDraftModel, tokens: torch.Tensor, taps: torch.Tensor
) -> dict[str, torch.Tensor]:
  """Blocks at ANCHORS: states, base logits, and what the heads add."""
  blocks, K = len(ANCHORS), model.block_size
  ids = tokens[None].long()
  anchored = torch.zeros_like(ids)
  anchored[0, list(ANCHORS)] = 1
  hidden, logits, _, _, places = model._backbone_forward(
    taps[None],
    ids,
    anchored,
    torch.zeros(1, NUM_TOKENS, WIDTH),
    torch.zeros_like(ids),
    max_anchors=blocks,
  )
  found = {
    "hidden": hidden.reshape(blocks, K, -1),
    "logits": logits.reshape(blocks, K, -1),
  }
  # The token before each slot's prediction, as the trainer pairs them.
  before = ids[0, places].reshape(blocks, K)
  if not model.config.sample_from_anchor:
    before = torch.cat([before[:, :1], before[:, :-1]], dim=1)
  if isinstance(model, DFlash2DraftModel):
    candidates, scores = model.candidate_selector.select(
      found["logits"], found["hidden"], before
    )
    found |= {"candidates": candidates.int(), "scores": scores}
  if isinstance(model, DSparkDraftModel):
    head = model.markov_head
    bias = head.block_bias(prev_token_ids=before, hidden_states=found["hidden"])
    seen = [found["hidden"], head.prev_embeddings(before)]
    both = model.config.confidence_head_with_markov
    features = torch.cat(seen[: 2 if both else 1], dim=-1)
    found["corrected"] = found["logits"] + bias
    found["confidence"] = model.confidence_head(features)
  return {name: tensor.contiguous() for name, tensor in found.items()}


def save(
  model: torch.nn.Module, directory: pathlib.Path, dtype: torch.dtype
) -> None:
  """As the package saves it, without the code that it copies there."""
  model.to(dtype).save_pretrained(directory)
  for code in directory.glob("*.py"):
    code.unlink()


def write(out: pathlib.Path) -> None:
  """The verifier and all cases; the working directory must be `out`."""
  write_verifier(out / VERIFIER)
  for seed, (case, (kind, layer, changes, dtype)) in enumerate(CASES.items()):
    torch.manual_seed(seed)
    save(build(kind, layer, changes), out / case, dtype)
    inputs = draw_inputs()
    truth = inputs | run(load(out / case), **inputs)
    safetensors.torch.save_file(truth, out / case / "golden.safetensors")
  torch.manual_seed(len(CASES))
  model = build_eagle3()
  save(model, out / "eagle3", torch.float32)
  truth = eagle3.run(load(out / "eagle3"))
  safetensors.torch.save_file(truth, out / "eagle3" / "golden.safetensors")
  for path in out.rglob("*"):
    path.chmod(0o755 if path.is_dir() else 0o644)


def compare(out: pathlib.Path, made: pathlib.Path) -> None:
  """Raises unless drafters in `made`, named as cases, do as the truth says."""
  for directory in sorted(made.iterdir()):
    truth = safetensors.torch.load_file(
      out / directory.name / "golden.safetensors"
    )
    model = load(directory)
    if directory.name == "eagle3":
      torch.manual_seed(len(CASES))
      build_eagle3()  # moves the generator to where the inputs were drawn
      again = eagle3.run(model)
    else:
      again = run(model, truth["tokens"], truth["taps"])
    for name, tensor in again.items():
      torch.testing.assert_close(tensor, truth[name], rtol=1e-5, atol=1e-5)
    print(directory.name, "is read by the package as it should")


def main() -> None:
  """Writes, or compares with what is there."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--check", action="store_true")
  parser.add_argument("--load", type=pathlib.Path)
  flags = parser.parse_args()
  torch.set_num_threads(1)
  out = flags.out.absolute()
  if flags.load:
    made = flags.load.absolute()
    with contextlib.chdir(out):
      compare(out, made)
    return
  with tempfile.TemporaryDirectory() as place:
    fresh = pathlib.Path(place) / "speculators"
    fresh.mkdir()
    with contextlib.chdir(fresh):
      write(fresh)
    if not flags.check:
      shutil.rmtree(out, ignore_errors=True)
      shutil.copytree(fresh, out)
      return
    for path in sorted(fresh.rglob("*.safetensors")):
      old = safetensors.torch.load_file(out / path.relative_to(fresh))
      for name, tensor in safetensors.torch.load_file(path).items():
        torch.testing.assert_close(tensor, old[name])
  print("the stored goldens are these")


if __name__ == "__main__":
  main()
