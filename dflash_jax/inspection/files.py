"""What lies in a checkpoint's directory besides what is read."""

import pathlib
from collections.abc import Iterable

from dflash_jax.inspection.report import Report
from dflash_jax.weights.fields import Fields

_PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
_CODE = {".py", ".pyc", ".so", ".sh"}
_MOST_NAMED = 5


def note_files(report: Report, directory: pathlib.Path) -> None:
  """Names code, pickles and symbolic links; opens none of them.

  Links are followed, as the loaders follow them: the hub's cache is made of
  them, and what they lead to is read as data like everything else.
  """
  entries = sorted(directory.iterdir())
  code = [entry.name for entry in entries if entry.suffix in _CODE]
  pickles = [entry.name for entry in entries if entry.suffix in _PICKLES]
  if code:
    report.add_note(f"code is there and is never run: {_some(code)}")
  if pickles:
    report.add_note(
      f"pickles are there and are never opened: {_some(pickles)}; only "
      "safetensors are read"
    )
  for entry in entries:
    if entry.is_symlink():
      _note_link(report, directory, entry)


def _note_link(
  report: Report, directory: pathlib.Path, entry: pathlib.Path
) -> None:
  if not entry.exists():
    report.add_problem(
      f"{entry}: is a link to {entry.readlink()}, which is not there; fetch "
      "the checkpoint again, or copy it with what its links lead to"
    )
    return
  place = entry.resolve()
  is_cache = place.parent.name == "blobs" and "snapshots" in directory.parts
  if directory.resolve() not in place.parents and not is_cache:
    report.add_note(
      f"{entry.name} is a link out of the directory, to {place}; it is read as "
      "data, and a copy of the directory may lack it"
    )


def note_options(report: Report, fields: Fields, dtypes: Iterable[str]) -> None:
  """What config.json says and no loader here cares about."""
  if fields.raw("auto_map") is not None:
    report.add_note(
      f"config.json names code, auto_map={fields.raw('auto_map')!r:.200}: an "
      "engine told to trust remote code may run it; nothing here does"
    )
  stated = fields.raw("torch_dtype") or fields.raw("dtype")
  names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
  known = [dtype for dtype in dtypes if dtype in names.values()]
  is_named = isinstance(stated, str) and stated in names
  if is_named and known and names[stated] not in known:
    report.add_note(
      f"config.json says {stated}, but weights are stored as {', '.join(known)}"
    )


def _some(names: list[str]) -> str:
  listed = ", ".join(names[:_MOST_NAMED])
  more = len(names) - _MOST_NAMED
  return listed if more <= 0 else f"{listed} and {more} more"
