"""Drafters that may be written: of a run's checkpoint, or of a directory."""

import dataclasses
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from dflash_jax import weights
from dflash_jax.config import (
  Config,
  ConfigError,
  DrafterConfig,
  TargetConfig,
)
from dflash_jax.drafters import DFlash, Eagle3, LanguageModel
from dflash_jax.model import borrow, load_target
from dflash_jax.target import Params
from dflash_jax.weights.fields import read_json
from train.checkpoint import CheckpointError, Checkpoints
from train.design import Trainable, make_drafter
from train.record import read_config, read_run

Ids = tuple[int, ...] | None  # a draft vocabulary


@dataclasses.dataclass(frozen=True)
class Drafter:
  """A drafter to write.

  Attributes:
    formulas: of it.
    params: that a reader should find.
    ids: its draft vocabulary, where no parameter holds it.
    facts: where it came from, for config.json.
    serving: its use, as the speculators layout says it.
    head: f[V', D], the target's head for `ids`, where it is at hand.
  """

  formulas: Trainable
  params: Params
  ids: Ids
  facts: dict[str, Any] | None
  serving: weights.Serving = weights.Serving()
  head: np.ndarray | None = None


# --- A run --------------------------------------------------------------------


def read_checkpoint(workdir: str, step: str, with_head: bool) -> Drafter:
  """The drafter of a run's checkpoint.

  Args:
    workdir: of the run.
    step: "best" by held-out tau, "latest", or a number.
    with_head: whether the target's head for a draft vocabulary is wanted.
  """
  config, run = read_config(workdir), read_run(workdir)
  checkpoints = Checkpoints(
    workdir, config.train.keep_checkpoints, read_only=True
  )
  number = _choose_step(checkpoints, step)
  formulas = make_drafter(config.drafter, run.drafter)
  ids = run.draft_vocabulary
  params = checkpoints.restore_drafter(
    formulas, number, columns=None if ids is None else len(ids)
  )
  tau = checkpoints.taus[number]
  checkpoints.close()
  origin = {"run": config.name, "target": config.target.path, "step": number}
  apart = ids if isinstance(formulas, DFlash) else None
  head = None
  if with_head and apart is not None:
    head = _head_rows(load_target(config)[1], apart)
  return Drafter(
    formulas,
    _complete(config, formulas, params, ids),
    apart,
    {**origin, "held_out_tau": tau},
    _name_target(config, formulas),
    head,
  )


def _choose_step(checkpoints: Checkpoints, step: str) -> int:
  if step.isdecimal():
    return int(step)
  choices = {"best": checkpoints.best_step, "latest": checkpoints.latest_step}
  if step not in choices:
    raise ConfigError(f"--step={step} is unknown; choose best, latest or N")
  number = choices[step]
  if number is None:
    raise CheckpointError(
      f"{checkpoints.directory} holds no checkpoint yet; let train.main run"
    )
  return number


def _complete(
  config: Config, drafter: Trainable, params: Params, ids: Ids
) -> Params:
  """What a reader of the checkpoint should find."""
  if isinstance(drafter, DFlash):
    return params
  if isinstance(drafter, Eagle3):
    if ids is None or len(ids) == drafter.config.vocab_size:
      return params
    return {**params, "head_ids": jnp.array(ids, jnp.int32)}
  if not drafter.borrows:
    return drafter.bind(params)
  return drafter.bind(params, borrow(load_target(config)[1], None))


def _name_target(config: Config, formulas: Trainable) -> weights.Serving:
  """The drafter's use; its target, if other engines can find it by name."""
  # A block drafter's network says how many it drafts.
  drafts = formulas.max_drafts if isinstance(formulas, Eagle3) else 0
  path = config.target.path
  if path.startswith(weights.PACKAGE_PREFIX) or path.endswith(".gguf"):
    path = ""
  return weights.Serving(path, _read_architectures(path), drafts)


# --- A directory --------------------------------------------------------------


def read_directory(source: str, dtype: str | None = "float32") -> Drafter:
  """A drafter in a published layout, of whichever kind.

  Args:
    source: the directory, or "owner/name" on the hub.
    dtype: of the parameters; None as they are stored.
  """
  formulas: Trainable
  ids: Ids = None
  kind = weights.drafter_kind(source)
  if kind == "dflash":
    blocks, params, vocabulary = weights.load_drafter(source, dtype)
    formulas = DFlash(blocks)
    ids = None if vocabulary is None else tuple(vocabulary.tolist())
  elif kind == "eagle3":
    eagle, params = weights.load_eagle3(source, dtype)
    formulas = Eagle3(eagle, max_drafts=1)
  else:
    model, params = weights.load_target(source, dtype, drafts=True)
    formulas = LanguageModel(model, max_drafts=1)
    return Drafter(formulas, params, ids, _read_facts(source))
  serving = weights.read_speculators_serving(source)
  head = None if ids is None else weights.read_speculators_head(source)
  facts = _read_facts(source)
  return Drafter(formulas, params, ids, facts, serving, head)


def _read_facts(source: str) -> dict[str, Any] | None:
  """What an earlier export said of where the drafter came from."""
  directory = pathlib.Path(source)
  if not directory.is_dir():
    return None
  facts = read_json(directory / "config.json").get("dflash_jax")
  return facts if isinstance(facts, dict) else None


# --- The target ---------------------------------------------------------------


def with_verifier(drafter: Drafter, name: str, with_head: bool) -> Drafter:
  """The drafter with what a named target adds: depth, head, name.

  Args:
    drafter: any but a language model.
    name: the target, a hub id or a directory; only a directory is read.
    with_head: whether the target's head for a draft vocabulary is wanted.

  Raises:
    ConfigError: the drafter is for another target.
    WeightsError: the directory holds no target.
  """
  serving = dataclasses.replace(drafter.serving, verifier=name)
  if not pathlib.Path(name).is_dir():
    return dataclasses.replace(drafter, serving=serving)
  formulas = _on_target(drafter.formulas, weights.read_target_config(name))
  head = drafter.head
  if with_head and head is None and drafter.ids is not None:
    _, params = weights.load_target(name)
    norm = drafter.params["norm"]["scale"]
    head = _head_rows(params, drafter.ids).astype(norm.dtype)
  serving = dataclasses.replace(
    serving, architectures=_read_architectures(name)
  )
  return dataclasses.replace(
    drafter, formulas=formulas, serving=serving, head=head
  )


def _on_target(formulas: Trainable, target: TargetConfig) -> Trainable:
  """The drafter, checked against its target, and told how deep that is."""
  config = formulas.config
  if isinstance(formulas, DFlash):
    assert isinstance(config, DrafterConfig)
    config.check_target(target)
    return DFlash(
      dataclasses.replace(config, num_target_layers=target.num_layers)
    )
  formulas.check_target(target)
  return formulas


def _head_rows(target_params: Params, ids: tuple[int, ...]) -> np.ndarray:
  """f[V', D], rows of the target's head as files store them."""
  return np.asarray(target_params["head"]["kernel"]).T[list(ids)]


def _read_architectures(name: str) -> tuple[str, ...]:
  """What a target's config.json calls it; nothing if it is not a directory."""
  path = pathlib.Path(name) / "config.json"
  if not name or not path.exists():
    return ()
  found = read_json(path).get("architectures")
  return tuple(found) if isinstance(found, list) else ()
