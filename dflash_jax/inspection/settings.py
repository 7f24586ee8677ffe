"""Every faulty setting of a config.json, by the reader that stops at the first.

The strict reader is run again on a copy without the setting that it has named,
and again, until it names none that is new. So there is one set of rules, the
loaders' own.
"""

import dataclasses
import json
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

from dflash_jax.weights.fields import read_json
from dflash_jax.weights.model_directory import CONFIG_FILE
from dflash_jax.weights.names import OnError, WeightsError
from dflash_jax.weights.safetensors_file import StoredTensor, Tensors

Read = Callable[[pathlib.Path, Tensors], Any]

_MOST_FAULTS = 64
_CONTEXT = "fc.weight"  # the tensor that tells the target's width
# So wide that up to 20 taps divide it.
_WIDE = StoredTensor(
  pathlib.Path(), "F32", (1, 232_792_560), memoryview(b""), 0, 0
)
# What a reader that cannot do without a setting gets to go on with.
_STAND_INS: dict[str, Any] = {
  "block_size": 2,
  "conv_group_size": 1,
  "conv_kernel_size": 1,
  "eagle_aux_hidden_state_layer_ids": [1],
  "emb_dim": 1,
  "gru_hidden_dim": 1,
  "hidden_size": 64,
  "intermediate_size": 1,
  "mask_token_id": 0,
  "max_position_embeddings": 1,
  "num_attention_heads": 1,
  "num_hidden_layers": 1,
  "num_target_layers": 4096,
  "rms_norm_eps": 1e-6,
  "selector_rank": 1,
  "selector_top_k": 1,
  "target_layer_ids": [0],
  "vocab_size": 2**31 - 1,
}
# Settings whose fault leaves it open which tensors there should be.
_SHAPING = re.compile(
  r"(hidden|intermediate|vocab|draft_vocab)_size|num_\w*(layers|heads)|"
  r"head_dim|conv_.*|selector_.*|markov_.*|gru_.*|emb_dim|.*layer_ids|"
  r"layer_(types|windows|causal)|architectures|model_type|projector_type|"
  r".*confidence_head.*|tie_word_embeddings|t2d"
)
# How networks.py calls what config.json calls otherwise.
_KEYS = {
  "tap": "target_layer_ids",
  "num_heads": "num_attention_heads",
  "head_width": "head_dim",
  "convolution.group_size": "conv_group_size",
  "selector.top_k": "selector_top_k",
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a config.json came to.

  Attributes:
    network: as far as it can be made out; None if there is no telling.
    is_sound: whether there was no fault at all.
    is_known: whether the network's tensors should be the checkpoint's.
  """

  network: Any = None
  is_sound: bool = False
  is_known: bool = False


def read_settings(
  directory: pathlib.Path, tensors: Tensors, read: Read, on_error: OnError
) -> Settings:
  """The network that a directory describes, as far as it can be made out.

  Args:
    directory: of the checkpoint.
    tensors: those that could be read.
    read: the strict reader.
    on_error: told of each fault.
  """
  try:
    return Settings(read(directory, tensors), is_sound=True, is_known=True)
  except WeightsError as error:
    on_error(error)
    first = error
  try:
    values = read_json(directory / CONFIG_FILE)
  except WeightsError:  # which has been told
    return Settings()
  with tempfile.TemporaryDirectory() as place:
    copy = _Copy(pathlib.Path(place), values)
    return _read_mended(copy, directory, tensors, read, first, on_error)


class _Copy:
  """config.json in a directory of its own, with what is at fault taken out."""

  def __init__(self, place: pathlib.Path, values: dict[str, Any]):
    self.place = place
    self.values = values
    self.removed: set[str] = set()
    self.has_stand_ins = False

  def mend(self, key: str) -> bool:
    """Takes a setting out, or puts a stand-in there; whether that could be."""
    if key not in self.removed:
      self.removed.add(key)
      _remove(self.values, key)
      return True
    if key not in _STAND_INS or key in self.values:
      return False
    self.values[key] = _STAND_INS[key]
    types = self.values.get("layer_types")
    if key == "num_hidden_layers" and isinstance(types, list):
      self.values[key] = max(len(types), 1)
    self.has_stand_ins = True
    return True

  def write(self) -> None:
    (self.place / CONFIG_FILE).write_text(json.dumps(self.values))


def _read_mended(
  copy: _Copy,
  directory: pathlib.Path,
  tensors: Tensors,
  read: Read,
  error: WeightsError,
  on_error: OnError,
) -> Settings:
  """Goes on where the reader stopped with `error`, until it does no more."""
  is_known = True
  for _ in range(_MOST_FAULTS):
    key = _setting_of(error)
    if key == _CONTEXT:
      tensors = {**tensors, _CONTEXT: _WIDE}
    elif key:
      is_known = is_known and not _SHAPING.fullmatch(key)
      if not copy.mend(key):
        break
    copy.write()
    try:
      return Settings(read(copy.place, tensors), is_known=is_known)
    except WeightsError as another:
      error, named = another, _setting_of(another)
      # A fault of what was put in, or left out, is none of the file's.
      if named not in copy.removed and (named or not copy.has_stand_ins):
        text = str(another).replace(str(copy.place), str(directory))
        on_error(WeightsError(text, named))
      if not named:
        break
  return Settings()


def _setting_of(error: WeightsError) -> str:
  """The setting that an error names, "" if none."""
  if error.subject or error.__cause__ is None:
    return error.subject
  found = re.match(r"([\w.]+)(?==| \d| has )", str(error.__cause__))
  return _KEYS.get(found[1], found[1]) if found else ""


def _remove(values: Any, key: str) -> None:
  """Removes a key at every depth."""
  if isinstance(values, dict):
    values.pop(key, None)
    values = list(values.values())
  if isinstance(values, list):
    for value in values:
      _remove(value, key)
