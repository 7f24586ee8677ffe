"""Rows of benchmarks from the hub, or one error at once where it is shut."""

import json
from collections.abc import Iterator
from typing import Any

import huggingface_hub

from dflash_jax.prompts import PromptError
from eval.benchmarks.catalog import Entry
from eval.benchmarks.files import Place, say_files

# To find out whether there is a network; `datasets` itself would try for long.
PATIENCE_S = 5.0


def fetch(entry: Entry) -> Iterator[Place]:
  """The rows of a benchmark, through the package datasets.

  With HF_HUB_OFFLINE=1 in the environment, from its cache alone.

  Raises:
    PromptError: there is no way to them; says what to put where instead.
  """
  try:
    import datasets  # optional: files in --data_dir need none
  except ImportError as error:
    raise PromptError(
      _say(
        entry,
        "there is no --data_dir, and the package datasets, which fetches from "
        "the hub, is not installed: pip install 'dflash-jax[eval]'",
      )
    ) from error
  try:
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
      _reach(entry)
    rows = _load(entry, datasets)
  # The hub's client changes its HTTP library, and so its errors, with versions.
  except Exception as error:
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    raise PromptError(
      _say(
        entry,
        f"there is no --data_dir, and its data cannot be fetched ({message})",
      )
    ) from error
  for number, row in enumerate(rows, start=1):
    yield f"{source(entry)}, row {number}", row


def source(entry: Entry) -> str:
  """Where `fetch` looks, for the record."""
  if entry.urls:
    return ", ".join(entry.urls)
  return "/".join(filter(None, (entry.hub, entry.config, entry.split)))


def _reach(entry: Entry) -> None:
  """Raises whatever the network does if the data is out of reach."""
  first = entry.urls[0] if entry.urls else f"hf://datasets/{entry.hub}"
  if first.startswith("hf://"):
    owner, name = first.removeprefix("hf://datasets/").split("/")[:2]
    huggingface_hub.HfApi().dataset_info(f"{owner}/{name}", timeout=PATIENCE_S)
  else:
    session = huggingface_hub.get_session()
    session.head(first, timeout=PATIENCE_S).raise_for_status()


def _load(entry: Entry, datasets: Any) -> Any:
  if not entry.urls:
    return datasets.load_dataset(entry.hub, entry.config, split=entry.split)
  if entry.urls[0].startswith("hf://"):
    urls = list(entry.urls)
    return datasets.load_dataset("json", data_files=urls, split="train")
  # Not on the hub: `datasets` would need more packages to read what is not.
  response = huggingface_hub.get_session().get(entry.urls[0])
  response.raise_for_status()
  return [json.loads(line) for line in response.text.split("\n") if line]


def _say(entry: Entry, why: str) -> str:
  return (
    f"benchmark {entry.name}: {why}; without a network, put "
    f"{say_files(entry)} into DIR/{entry.name} and pass --data_dir=DIR; it is "
    f"published at {entry.published}"
  )
