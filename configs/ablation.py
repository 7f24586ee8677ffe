r"""Which drafter, which loss, which shape: one change at a time, equal budgets.

    python -m train.ablate --config=configs/ablation.py --jobs=2

The target is SmolLM2-135M-Instruct and the corpus that of
docs/default_drafter.md. Every drafter has 12.3 million parameters of its own,
give or take 3%: what a part costs, the MLP pays. docs/results/ablation.md is
what came out. Arms stand in the order of their importance, and all are trained
with the first seed before any with the second: a grid that is stopped early has
covered all of them.
"""

import dataclasses
import pathlib

from dflash_jax import config_file
from dflash_jax.config import AblationConfig, Config, EvalConfig

BASE = pathlib.Path(__file__).parent / "smollm2_135m_cpu.py"
STEPS = 320

# Sizes of heads are the published ones, scaled from a width of 4096 to 576.
DFLASH2 = "drafter.name=dflash2 drafter.selector_rank=32 drafter.mlp_width=1152"
DSPARK = (
  "drafter.name=dspark drafter.block_size=7 drafter.markov_rank=32 "
  "drafter.mlp_width=1152"
)
DOMINO = (
  "drafter.name=domino drafter.block_size=7 drafter.gru_width=144 "
  "drafter.gru_rank=64 drafter.mlp_width=1408"
)
EAGLE3 = (
  "drafter.name=eagle3 drafter.num_layers=1 drafter.mlp_width=2944 "
  "drafter.taps=(1,14,27)"
)
LM = "drafter.name=lm drafter.mlp_width=1856 drafter.draft_vocabulary=0"

ARMS = (
  "dflash:",
  "decay: train.slot_weights=decay",
  f"dflash2: {DFLASH2} 'train.loss=ce + selector'",
  f"dspark: {DSPARK} drafter.confidence=False",
  f"domino: {DOMINO} train.curriculum=1.0",
  f"eagle3: {EAGLE3} train.loss=kl train.slot_weights=decay",
  f"lm: {LM} 'train.loss=ce + kl' train.slot_weights=uniform",
  "ngram: drafter.path=ngram",
  f"dspark_own: {DSPARK} 'train.loss=0.1*ce + 1.8*tv + confidence' "
  "train.slot_weights=decay",
  "kl: train.loss=kl",
  "tv: 'train.loss=0.1*ce + 1.8*tv'",
  "lk: train.loss=lk",
  "uniform: train.slot_weights=uniform",
  "causal: drafter.layer_causal=(True,True,True)",
  "muon: train.optimizer=muon",
  f"dflash2_muon: {DFLASH2} 'train.loss=ce + selector' train.optimizer=muon",
  "block4: drafter.block_size=4",
  "block16: drafter.block_size=16",
  "layers2: drafter.num_layers=2 drafter.mlp_width=2560",
  "layers5: drafter.num_layers=5 drafter.mlp_width=704",
  "taps3: drafter.num_taps=3 drafter.mlp_width=1664",
  "tap1: drafter.taps=(14,) drafter.mlp_width=1792",
)

# Notes say what was published, of far larger runs: tau, unless they say speed.
COMPARE = (
  "dflash vs decay: D-PACE +4.5% (speculators) to +13% (arXiv 2605.18810)",
  "dflash2 vs dflash: +21% to +28% (DFlash 2 release)",
  "dspark vs dflash: +16% to +18%, loss and confidence head included "
  "(arXiv 2607.05147)",
  "domino vs dflash: +20%, head on against off (arXiv 2605.29707)",
  "dflash vs eagle3: +1% to +5% in mathematics, +16% to +29% in chat "
  "(arXiv 2607.05147); -22% and +14% speed (arXiv 2605.29707)",
  "dflash vs lm",
  "dflash vs ngram",
  "dspark_own vs dspark",
  "dspark_own vs dflash: +16% to +18% (arXiv 2607.05147)",
  "kl vs dflash: within 3% (arXiv 2606.18394)",
  "tv vs dflash",
  "lk vs dflash",
  "decay vs uniform: +5% after one epoch, gone after five (arXiv 2602.06036)",
  "causal vs dflash: none for chains (arXiv 2606.18394)",
  "muon vs dflash: better, without numbers (speculators)",
  "dflash2_muon vs dflash2",
  "dflash2_muon vs muon",
  "block4 vs dflash",
  "block16 vs dflash",
  "layers2 vs dflash",
  "layers5 vs dflash: +6%, with more parameters (arXiv 2602.06036)",
  "taps3 vs dflash: -3% to -5% (arXiv 2602.06036)",
  "tap1 vs dflash",
)


def get_config() -> Config:
  """320 steps of 2 sequences x 32 anchors, two seeds, greedy and sampled."""
  base = config_file.read(BASE)
  return dataclasses.replace(
    base,
    name="ablation",
    decode=dataclasses.replace(base.decode, prefill_chunk=32),
    train=dataclasses.replace(
      base.train,
      corpus=("corpus/self", "corpus/gsm8k"),
      feature_cache="corpus/features",
      steps=STEPS,
      learning_rate=2e-3,
      loss="ce",
      log_every=50,
      evaluate_every=STEPS,
      checkpoint_every=STEPS,
      evaluate_sequences=48,
      keep_checkpoints=1,
    ),
    eval=EvalConfig(
      limit=8,
      max_new_tokens=48,
      sweep=(
        "width=fixed:3",
        "temperature=1 rule=block draft_temperature=1 width=fixed:3",
      ),
    ),
    ablation=AblationConfig(
      arms=ARMS,
      seeds=(0, 1),
      prompts=("eval/prompts/chat.jsonl", "eval/prompts/mixed.jsonl"),
      compare=COMPARE,
    ),
  )
