"""How other engines serve a drafter: the command for each, or that none can.

Engines count differently. vLLM and TensorRT-LLM are told how many tokens are
drafted; SGLang how many are verified, the anchor among them, but of DSpark how
many are drafted. A DFlash block of K slots drafts K - 1, a DSpark block K.
Sources, September 2026: vllm-project/vllm, docs/features/speculative_decoding
and #52816 (DFlash 2), #47627 (Domino); sgl-project/sglang, docs_new/docs/
advanced_features/{speculative_decoding,dspark}.mdx and #35371 (DFlash 2),
#36899 (Domino); NVIDIA/TensorRT-LLM, docs/source/features/
speculative-decoding.md and _torch/models/modeling_dspark.py; package dflash
0.1.0; transformers, assisted generation.
"""

import dataclasses
import json
from collections.abc import Sequence

from dflash_jax.config import DrafterConfig
from dflash_jax.inspection.facts import Network
from dflash_jax.networks import Eagle3Config
from dflash_jax.weights import drafter_parts

_NAMES = {
  drafter_parts.DFLASH: "dflash",
  drafter_parts.DFLASH2: "dflash2",
  drafter_parts.DSPARK: "dspark",
  drafter_parts.DOMINO: "domino",
  drafter_parts.MIXED: "mixed",
}


@dataclasses.dataclass(frozen=True)
class Serving:
  """One engine.

  Attributes:
    engine: its name.
    command: that serves the drafter; "" if the engine cannot.
    note: what to know of it, or why it cannot.
    language: of the command, for Markdown.
  """

  engine: str
  command: str
  note: str = ""
  language: str = "bash"


def kind_of(network: Network) -> str:
  """The drafter's name in DraftConfig, or "mixed" for parts that mix."""
  if isinstance(network, DrafterConfig):
    return _NAMES[drafter_parts.architecture_of(network)]
  return "eagle3" if isinstance(network, Eagle3Config) else "lm"


def plan_serving(
  network: Network, target: str, drafter: str, chain: int
) -> list[Serving]:
  """The four engines, each with its command or its reason.

  Args:
    network: the drafter.
    target, drafter: directories or hub ids.
    chain: drafts of a round, of a drafter that makes them one by one.
  """
  kind = kind_of(network)
  if reason := _reason_for_none(network, kind):
    names = ("vLLM", "SGLang", "TensorRT-LLM", "transformers")
    return [Serving(name, "", reason) for name in names]
  block = drafts = chain
  if isinstance(network, DrafterConfig):
    block, drafts = network.block_size, network.num_drafts
  return [
    _plan_vllm(kind, target, drafter, drafts),
    _plan_sglang(kind, target, drafter, block, drafts),
    _plan_tensorrt(kind, target, drafter, drafts),
    _plan_transformers(kind, target, drafter, drafts),
  ]


def _reason_for_none(network: Network, kind: str) -> str:
  """Why no engine can serve a drafter, "" if some can."""
  if kind == "mixed":
    return "knows no drafter with this mixture of parts, and none of its name"
  if kind == "dspark" and not getattr(network, "anchor_predicts", True):
    return "drafts DSpark blocks from the anchor on, which this one does not"
  return ""


def _plan_vllm(kind: str, target: str, drafter: str, drafts: int) -> Serving:
  if kind == "domino":
    return Serving(
      "vLLM",
      "",
      "has no Domino: its pull request, vllm-project/vllm #47627, was closed "
      "without being merged",
    )
  methods = {"dflash2": "dflash", "lm": "draft_model"}
  speculation = {
    "method": methods.get(kind, kind),
    "model": drafter,
    "num_speculative_tokens": drafts,
  }
  return Serving(
    "vLLM",
    _shell(
      f"vllm serve {target}",
      f"--speculative-config '{json.dumps(speculation)}'",
    ),
    f"`num_speculative_tokens` counts drafts: {drafts}, without the anchor.",
  )


def _plan_sglang(
  kind: str, target: str, drafter: str, block: int, drafts: int
) -> Serving:
  flags = [f"--model-path {target}"]
  algorithm = {"dspark": "DSPARK", "eagle3": "EAGLE3", "lm": "STANDALONE"}
  flags.append(f"--speculative-algorithm {algorithm.get(kind, 'DFLASH')}")
  flags.append(f"--speculative-draft-model-path {drafter}")
  if kind in ("eagle3", "lm"):
    flags += [
      f"--speculative-num-steps {drafts}",
      "--speculative-eagle-topk 1",
      f"--speculative-num-draft-tokens {drafts + 1}",
    ]
    note = f"{drafts} drafts in a chain; the verified tokens are one more."
  elif kind == "dspark":
    flags.append(f"--speculative-dspark-block-size {drafts}")
    note = f"The block size counts drafts: {drafts}; {drafts + 1} are verified."
  else:
    flags.append(f"--speculative-num-draft-tokens {block}")
    note = f"The number counts the block's slots: {block}, the anchor included."
  if kind == "domino":
    note += (
      " Domino came with sgl-project/sglang #36899, for one GPU, bfloat16 and "
      "greedy decoding."
    )
  return Serving(
    "SGLang", _shell("python -m sglang.launch_server", *flags), note
  )


def _plan_tensorrt(
  kind: str, target: str, drafter: str, drafts: int
) -> Serving:
  types = {
    "dflash": "DFlash",
    "dspark": "DSpark",
    "eagle3": "Eagle3",
    "lm": "DraftTarget",
  }
  if kind not in types:
    return Serving(
      "TensorRT-LLM",
      "",
      "names no drafter of this kind, only DFlash, DSpark and EAGLE-3, and "
      "would leave out what this one adds to DFlash",
    )
  # Its documentation shows draft models so, and no other kind.
  lines = ["disable_overlap_scheduler: true"] if kind == "lm" else []
  lines += [
    "speculative_config:",
    f"  decoding_type: {types[kind]}",
    f"  max_draft_len: {drafts}",
    f"  speculative_model: {drafter}",
  ]
  file = "\n".join(lines)
  note = f"`max_draft_len` counts drafts: {drafts}, without the anchor."
  if kind == "dspark":
    note += " DSpark is in its sources and not yet in its documentation."
  return Serving(
    "TensorRT-LLM",
    f"cat > speculation.yaml <<'END'\n{file}\nEND\n"
    + _shell(f"trtllm-serve {target}", "--config speculation.yaml"),
    note,
  )


def _plan_transformers(
  kind: str, target: str, drafter: str, drafts: int
) -> Serving:
  if kind in ("dflash", "dflash2"):
    return Serving(
      "transformers",
      'pip install "dflash[local]"\n'
      + _shell(
        "dflash generate transformers",
        f"--model {target}",
        f"--draft {drafter}",
        '"Why is the sky blue?"',
      ),
      "Through package dflash, which lists Qwen3 and Llama-3.1-8B as DFlash "
      "targets and Muse-Glimmer-30B for DFlash 2; the block size is read from "
      "config.json.",
    )
  if kind == "lm":
    return Serving(
      "transformers",
      _assisted(target, drafter, drafts),
      f"Assisted generation, {drafts} drafts a round.",
      "python",
    )
  return Serving(
    "transformers",
    "",
    "has no generation with this kind of drafter, and package dflash neither",
  )


def _assisted(target: str, drafter: str, drafts: int) -> str:
  return "\n".join(
    [
      "from transformers import AutoModelForCausalLM, AutoTokenizer",
      "",
      f'tokenizer = AutoTokenizer.from_pretrained("{target}")',
      f'target = AutoModelForCausalLM.from_pretrained("{target}")',
      f'drafter = AutoModelForCausalLM.from_pretrained("{drafter}")',
      f"drafter.generation_config.num_assistant_tokens = {drafts}",
      'drafter.generation_config.num_assistant_tokens_schedule = "constant"',
      'inputs = tokenizer("Why is the sky blue?", return_tensors="pt")',
      "reply = target.generate(**inputs, assistant_model=drafter)",
      "print(tokenizer.decode(reply[0], skip_special_tokens=True))",
    ]
  )


def _shell(first: str, *rest: str) -> str:
  """A command, an option a line."""
  return " \\\n  ".join([first, *rest])


def to_markdown(servings: Sequence[Serving]) -> list[str]:
  """A heading, command and note for each engine."""
  lines: list[str] = []
  for serving in servings:
    lines += [f"### {serving.engine}", ""]
    if serving.command:
      lines += [f"```{serving.language}", serving.command, "```", ""]
      lines += [serving.note, ""]
    else:
      lines += [f"Not served: {serving.engine} {serving.note}.", ""]
  return lines
