"""What tools/gpu_run.sh leaves to Python: checks, archives, the summary.

    python -m tools.gpu_run check --config=FILE --state=DIR

Standard library only until `check` has said what is installed.
"""

import argparse
import configparser
import datetime
import importlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = (
  "train.synthesize",
  "train.main",
  "train.export",
  "eval.main",
  "pallas_kernels.bench",
)
SHOWN = (
  "jax",
  "jaxlib",
  "jax-cuda13-plugin",
  "flax",
  "optax",
  "orbax-checkpoint",
  "transformers",
)
PACKAGE = "package:"
REMEDY = (
  "Install what is named, or carry its wheel in the inputs folder (docs/gpu.md)"
)
NO_TARGET = 3  # exit code


def main() -> None:
  """Runs one command."""
  parser = argparse.ArgumentParser()
  parser.add_argument(
    "command",
    choices=("check", "rate", "pack", "unpack", "summary"),
  )
  parser.add_argument("paths", nargs="*")
  for name in ("config", "state", "workdir", "archive", "out", "command_line"):
    parser.add_argument(f"--{name}", default="")
  parser.add_argument("--next", default="")
  parser.add_argument("--cpu", action="store_true")
  options = parser.parse_intermixed_args()
  if problem := globals()[f"_{options.command}"](options):
    print(problem, file=sys.stderr)
    sys.exit(1)


# --- Checks -------------------------------------------------------------------


def _check(options: argparse.Namespace) -> str:
  """Names every package that is missing or too old; then the device."""
  if problems := list(_find_unmet()):
    return f"{'; '.join(problems)}. {REMEDY}"
  for program in PROGRAMS:
    try:
      importlib.import_module(program)
    except ImportError as error:
      return f"{program} does not start here: {error}"
  import jax

  state = pathlib.Path(options.state)
  device = jax.devices()[0]
  machine: dict[str, Any] = {
    "device": f"{jax.device_count()} x {device.device_kind}",
    "driver": _read_driver(),
    "python": platform.python_version(),
    "versions": {name: _version(name) for name in SHOWN},
  }
  (state / "machine" / "machine.json").write_text(json.dumps(machine))
  found = (f"{k} {v}" for k, v in machine["versions"].items() if v)
  print(f"{machine['device']}, driver {machine['driver']}")
  print(f"Python {machine['python']}, {', '.join(found)}")
  if device.platform != "gpu" and not options.cpu:
    return (
      f"JAX finds no GPU here, only {device.platform}; install jax[cuda13], or "
      "try the script with --cpu"
    )
  target = _find_target(options.config, state)
  if not _version("gguf") and _is_gguf(target or _read_path(options.config)):
    return f"gguf is missing, and the target is in its format. {REMEDY}"
  (state / "machine" / "target").write_text(target)
  return ""


def _find_unmet() -> Iterator[str]:
  """Requirements of setup.cfg that this environment does not meet."""
  from packaging.requirements import Requirement

  setup = configparser.ConfigParser(interpolation=None)
  setup.read(ROOT / "setup.cfg", encoding="utf-8")
  options = setup["options"]
  for line in options["install_requires"].split():
    wanted = Requirement(line)
    version = _version(wanted.name)
    if not version:
      yield f"{wanted.name} is missing"
    elif not wanted.specifier.contains(version, prereleases=True):
      yield f"{wanted.name} {version} is too old: {wanted.specifier} is needed"


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return ""


def _read_driver() -> str:
  query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
  try:
    found = subprocess.run(query, capture_output=True, text=True, timeout=30)
  except (OSError, subprocess.TimeoutExpired):
    return "none"
  return found.stdout.split("\n")[0].strip() or "none"


def _find_target(config: str, state: pathlib.Path) -> str:
  """The .gguf to use instead of a package that is not installed, or ""."""
  path = _read_path(config)
  package = path.removeprefix(PACKAGE)
  if package == path or _version(package):
    return ""
  found = sorted((state / "inputs").rglob("*.gguf"))
  if not found:
    print(
      f"the target is in the package {package}, which is not installed; carry "
      "its wheel, or the .gguf file in it (docs/gpu.md)",
      file=sys.stderr,
    )
    sys.exit(NO_TARGET)
  return str(found[0])


def _read_path(config: str) -> str:
  """The path of a config's target."""
  from dflash_jax import config_file

  return config_file.read(config).target.path


def _is_gguf(path: str) -> bool:
  return path.startswith(PACKAGE) or path.endswith(".gguf")


# --- Archives -----------------------------------------------------------------


def _pack(options: argparse.Namespace) -> str:
  """Writes an archive of paths below the state; fast, since shards shrink."""
  archive, state = pathlib.Path(options.archive), pathlib.Path(options.state)
  partial = archive.with_name(archive.name + ".partial")
  with tarfile.open(partial, "w:xz", preset=1) as tar:
    for path in options.paths:
      if (state / path).exists():
        tar.add(state / path, path)
  partial.replace(archive)
  return ""


def _unpack(options: argparse.Namespace) -> str:
  """Restores an archive; what this machine knows already stays."""
  state = pathlib.Path(options.state)
  with tarfile.open(options.archive) as tar:
    for member in tar:
      if not (member.isfile() and (state / member.name).exists()):
        tar.extract(member, state, filter="data")
  return ""


# --- Speed and summary --------------------------------------------------------


def _rate(options: argparse.Namespace) -> str:
  """Prints steps per second at the end of a run."""
  records = _read_lines(pathlib.Path(options.workdir) / "metrics.jsonl")
  last = [r for r in records if r["kind"] == "train"][-1]
  print(f"{last['slots_per_s'] / last['slots']:.4f}")
  return ""


def _summary(options: argparse.Namespace) -> str:
  """Writes summary.md, a page, and metrics.jsonl, all records of the run."""
  state, out = pathlib.Path(options.state), pathlib.Path(options.out)
  training = _read_lines(state / "records" / "metrics.jsonl")
  evaluations = [
    {"kind": "evaluation", "name": file.stem, **_read_json(file)}
    for file in sorted((state / "records").glob("*-*.json"))
  ]
  lines = [json.dumps(record) for record in [*training, *evaluations]]
  (out / "metrics.jsonl").write_text("".join(f"{x}\n" for x in lines))
  parts = [
    f"# GPU run of {options.config}",
    f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC. "
    + (f"Not done: {options.next}." if options.next else "Done."),
    *_describe_machine(state),
    *_describe_corpus(state),
    *_describe_training(state, training),
    *_describe_evaluations(evaluations),
    *_describe_kernels(_read_json(state / "records" / "kernels.json")),
    "## Commands",
    f"    {options.command_line}",
    *_describe_files(out),
  ]
  (out / "summary.md").write_text("\n\n".join(parts) + "\n")
  return ""


def _describe_machine(state: pathlib.Path) -> list[str]:
  machine = _read_json(state / "machine" / "machine.json")
  if not machine:
    return []
  versions = (f"{k} {v}" for k, v in machine["versions"].items() if v)
  return [
    "## Machine",
    f"{machine['device']}, driver {machine['driver']}; Python "
    f"{machine['python']}, {', '.join(versions)}.",
    f"Tests: {_read_text(state / 'machine' / 'tests') or 'not run'}",
  ]


def _describe_corpus(state: pathlib.Path) -> list[str]:
  index = _read_json(state / "corpus" / "index.json")
  if not index:
    return []
  shards = index["shards"]
  answered, kept, tokens = (
    sum(shard.get(name, 0) for shard in shards)
    for name in ("prompts", "kept", "answer_tokens")
  )
  seconds = _read_text(state / "progress" / "synthesize_seconds") or "?"
  whole = "complete" if index["complete"] else "as far as time allowed"
  return [
    "## Corpus",
    f"{kept:,} of {answered:,} answers kept, {tokens:,} answer tokens in "
    f"{len(shards)} shards, {whole}; {seconds} s with self-written prompts and "
    "compilation.",
  ]


def _describe_training(
  state: pathlib.Path, records: list[dict[str, Any]]
) -> list[str]:
  held_out = [r for r in records if r["kind"] == "held_out"]
  steps = [r for r in records if r["kind"] == "train"]
  if not held_out or not steps:
    return []
  best = max(held_out, key=lambda r: r["tau"])
  last = steps[-1]
  total = _read_json(state / "records" / "config.json")["train"]["steps"]
  rows = [
    f"| {r['step']} | {r['loss']:.3f} | {r['tau']:.3f} |" for r in held_out
  ]
  return [
    "## Training",
    f"{last['step']:,} of {total:,} steps; {last['slots_per_s']:,.0f} "
    f"supervised slots/s, {last['slots_per_s'] / last['slots']:.2f} steps/s. "
    f"Best held-out tau {best['tau']:.3f} (walked, bonus included) at step "
    f"{best['step']:,}.",
    "\n".join(["| step | held-out loss | tau |", "|---|---|---|", *rows]),
  ]


def _describe_evaluations(records: list[dict[str, Any]]) -> list[str]:
  if not records:
    return []
  head = (
    "| prompts, dtype | replies | tau/request | tau/round | accept 1, 2, 3 "
    "| plain tok/s | speculative tok/s | speed-up | identical |"
  )
  rows = [
    f"| {r['name']} | {r['prompts']} | {r['tau_per_request']:.3f} "
    f"| {r['tau_per_round']:.3f} | "
    + ", ".join(f"{x:.2f}" for x in r["acceptance_per_position"][:3])
    + f" | {r['plain_tokens_per_s']:.1f} | {r['speculative_tokens_per_s']:.1f} "
    f"| {r['speedup']:.2f}x | {r['identical_fraction']:.1%} |"
    for r in records
  ]
  return [
    "## Evaluation",
    "Decoded, tau with bonus token; batch size "
    f"{records[0]['config']['eval']['batch_size']}.",
    "\n".join([head, "|" + "---|" * 9, *rows]),
  ]


def _describe_kernels(record: dict[str, Any]) -> list[str]:
  if not record:
    return []
  machine = record["machine"]
  aims = [
    f"* {aim['verdict']}: {aim['cases']}, {aim['implementation']}: "
    f"{aim['found']}; the aim is "
    + " and ".join(
      [f"{aim['share']:.0%} of a copy"] * bool(aim["share"])
      + [f"{aim['speedup']}x XLA"] * bool(aim["speedup"])
    )
    for aim in record["aims"]
  ]
  head = "| case | | us | GB/s | of a copy | TFLOP/s | x XLA | |"
  rows = [
    f"| {r['case']} | {r['implementation']} | "
    + (
      f"{r['seconds'] * 1e6:.1f} | {r['bytes_per_s'] / 1e9:.0f} "
      f"| {r['share_of_copy']:.0%} | {r['flops_per_s'] / 1e12:.1f} "
      f"| {r['speedup'] or 0:.2f}"
      if r["seconds"]
      else "| | | |"
    )
    + f" | {r['problem']} |"
    for r in record["rows"]
  ]
  return [
    "## Kernels",
    f"{machine['kind']}; a copy reads and writes "
    f"{machine['copy_bytes_per_s'] / 1e9:,.0f} GB/s. "
    + ("All cases." if record["complete"] else "Not all cases yet."),
    "\n".join(aims) or "No aim was tried.",
    "\n".join([head, "|" + "---|" * 8, *rows]),
  ]


def _describe_files(out: pathlib.Path) -> list[str]:
  pieces = sorted(out.glob("*.part*"))
  if not pieces:
    return []
  rows = [f"    {p.name}  {p.stat().st_size:,} bytes" for p in pieces]
  return [
    "## Files",
    "Join with `cat NAME.part* >NAME` and check with `sha256sum --check "
    "SHA256SUMS`; `tar xf` unpacks. To go on elsewhere, carry this folder.",
    "\n".join(rows),
  ]


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Records of a JSONL file; a line cut short by a kill is left out."""
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.split("\n")[:-1]]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def _read_text(path: pathlib.Path) -> str:
  return path.read_text().strip() if path.exists() else ""


if __name__ == "__main__":
  main()
