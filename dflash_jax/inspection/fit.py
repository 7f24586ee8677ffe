"""Whether a drafter fits a target, from what both say of themselves."""

import dataclasses
import pathlib
from typing import Any

from dflash_jax.config import ConfigError, DrafterConfig, TargetConfig
from dflash_jax.drafters import LanguageModel
from dflash_jax.inspection.facts import Network
from dflash_jax.inspection.report import Report
from dflash_jax.weights import (
  PACKAGE_PREFIX,
  find_directory,
  find_packaged_gguf,
  read_target_config,
)
from dflash_jax.weights.fields import read_json
from dflash_jax.weights.gguf import read_gguf_config
from dflash_jax.weights.gguf_file import read_gguf

# Roles of tokens that text is made with, so that a mask must be none of them.
_ROLES = ("bos", "eos", "eot", "eom", "padding", "pad", "unknown", "unk")


@dataclasses.dataclass(frozen=True)
class Target:
  """What a drafter must fit.

  Attributes:
    source: where it is.
    config: the network.
    roles: what its tokenizer uses a token for, by id.
  """

  source: str
  config: TargetConfig
  roles: dict[int, str]


def find_gguf(source: str) -> pathlib.Path | None:
  """The GGUF file that a source names, None if it names no such thing."""
  if source.startswith(PACKAGE_PREFIX):
    return find_packaged_gguf(source.removeprefix(PACKAGE_PREFIX))
  return pathlib.Path(source) if source.endswith(".gguf") else None


def read_target(source: str) -> Target:
  """A target's config and special tokens; its weights are not read.

  Raises:
    WeightsError: nothing usable is there.
  """
  if path := find_gguf(source):
    file = read_gguf(path)
    config = read_gguf_config(file)
    roles = {
      file.metadata.get(f"tokenizer.ggml.{role}_token_id"): role
      for role in _ROLES
    }
  else:
    directory = find_directory(source)
    config = read_target_config(directory)
    roles = _read_roles(directory)
  roles |= dict.fromkeys(config.eos_ids, "eos")
  known = {i: role for i, role in roles.items() if type(i) is int}
  return Target(source, config, known)


def _read_roles(directory: pathlib.Path) -> dict[Any, str]:
  """Ids by which config.json and the tokenizer's files name tokens."""
  roles: dict[Any, str] = {}
  values = read_json(directory / "config.json")
  for role in _ROLES:
    value = values.get(f"{role}_token_id")
    ids = value if isinstance(value, list) else [value]
    roles |= {i: role for i in ids if type(i) is int}
  path = directory / "tokenizer_config.json"
  if not path.exists():
    return roles
  settings = read_json(path)
  texts = {}
  for role in _ROLES:
    token = settings.get(f"{role}_token")
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str):
      texts[text] = role
  added = settings.get("added_tokens_decoder")
  for key, token in added.items() if isinstance(added, dict) else ():
    text = token.get("content") if isinstance(token, dict) else None
    if text in texts and str(key).isdecimal():
      roles[int(key)] = texts[text]
  return roles


def compare(report: Report, network: Network, target: Target) -> None:
  """Tells of everything in which a drafter and a target do not match."""
  report.facts["target"] = target.source
  for misfit in _misfits(network, target.config):
    report.add_problem(f"{target.source}: {misfit}")
  if isinstance(network, TargetConfig):
    return
  ours, theirs = network.rotary_base, target.config.rotary_base
  if ours != theirs:
    differ = f"rotary base is {ours} in the drafter and {theirs} in the target"
    if isinstance(network, DrafterConfig):
      report.add_problem(
        f"{target.source}: drafter and target do not match: {differ}; use the "
        "drafter trained for this target"
      )
    else:
      report.add_note(f"{differ}, as EAGLE-3's own layer may have it")
  if network.rotary_scaling != target.config.rotary_scaling:
    report.add_note(
      "rotary is stretched otherwise than the target's: "
      f"{network.rotary_scaling} and {target.config.rotary_scaling}"
    )
  if isinstance(network, DrafterConfig):
    _check_mask(report, network.mask_token_id, target)


def _misfits(network: Network, target: TargetConfig) -> list[str]:
  if not isinstance(network, TargetConfig):
    return network.misfits(target)
  try:
    LanguageModel(network, max_drafts=1).check_target(target)
  except ConfigError as error:
    return [str(error)]
  return []


def _check_mask(report: Report, mask: int, target: Target) -> None:
  role = target.roles.get(mask)
  if role is not None:
    report.add_problem(
      f"{target.source}: mask_token_id={mask} is the tokenizer's {role} token, "
      "so texts hold it where nothing is masked; train with a token that no "
      "text has",
      "mask_token_id",
    )
