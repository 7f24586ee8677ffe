"""The rules a file must keep to belong here: names, imports, sizes, pins."""

import ast
import configparser
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from dflash_jax.config import Config
from pallas_kernels import ahead

ROOT = pathlib.Path(__file__).parent.parent
MAX_LINES = 400

# What each package may import of the project: imports run one way.
MAY_IMPORT = {
  "pallas_kernels": {"pallas_kernels"},
  "dflash_jax": {"dflash_jax", "pallas_kernels"},
  "train": {"train", "dflash_jax", "pallas_kernels", "eval"},
  "eval": {"eval", "dflash_jax", "pallas_kernels"},
}
# What the kernels may import of others'.
KERNELS_IMPORT = {"jax", "numpy", "absl"}
# Everything that could be imported by its name from the root.
OURS = {*MAY_IMPORT, "configs", "tests", "tools"}
# Programs; everything else takes dataclasses, never flags.
READ_FLAGS = {
  "dflash_jax/__main__.py",
  "dflash_jax/command.py",
  "dflash_jax/decode_flags.py",
  "dflash_jax/inspect.py",
  "eval/agents.py",
  "eval/main.py",
  "eval/report.py",
  "eval/suite.py",
  "pallas_kernels/bench.py",
  "pallas_kernels/compile_check.py",
  "pallas_kernels/tune.py",
  "train/ablate.py",
  "train/export.py",
  "train/main.py",
  "train/synthesize.py",
}
FLAG_MODULES = ("absl.flags", "absl.app", "ml_collections.config_flags")
PINNED_EXTRAS = ("demo", "test", "aot")


def _files(*folders: str) -> list[str]:
  """Paths of Python files, from the root, that are not empty."""
  return sorted(
    str(file.relative_to(ROOT))
    for folder in folders
    for file in (ROOT / folder).rglob("*.py")
    if file.stat().st_size
  )


def _parse(file: str) -> ast.Module:
  return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def _imports(tree: ast.AST) -> set[str]:
  """Dotted names of all that is imported, wherever in the file."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names.update(alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"line {node.lineno}: import by the full name"
      names.update(f"{node.module}.{alias.name}" for alias in node.names)
  return names


def _is_part_of(name: str, *modules: str) -> bool:
  return any(f"{name}.".startswith(f"{module}.") for module in modules)


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
  parser = configparser.ConfigParser(interpolation=None)
  assert parser.read(ROOT / "setup.cfg", encoding="utf-8")
  return parser


# --- Source files -------------------------------------------------------------


PACKAGE_FILES = _files(*MAY_IMPORT)


@pytest.mark.parametrize("file", [*PACKAGE_FILES, *_files("configs", "tools")])
def test_module_says_what_it_is_for(file):
  assert ast.get_docstring(_parse(file)), f"{file} has no docstring"


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_imports_run_one_way(file):
  package = file.split(os.sep)[0]
  ours = {name.split(".")[0] for name in _imports(_parse(file))} & OURS
  assert ours <= MAY_IMPORT[package], (
    f"{file}: {package} must not import {ours - MAY_IMPORT[package]}"
  )


@pytest.mark.parametrize("file", _files("pallas_kernels"))
def test_kernels_need_jax_only(file):
  names = {name.split(".")[0] for name in _imports(_parse(file))}
  foreign = names - OURS - KERNELS_IMPORT - sys.stdlib_module_names
  assert not foreign, f"{file} imports {foreign}"


@pytest.mark.parametrize("file", [*PACKAGE_FILES, *_files("configs", "tests")])
def test_torch_is_not_needed(file):
  found = [n for n in _imports(_parse(file)) if _is_part_of(n, "torch")]
  assert not found, f"{file} imports {found}; only tools/goldens/ may"


@pytest.mark.parametrize("file", sorted({*PACKAGE_FILES} - READ_FLAGS))
def test_library_reads_no_flags(file):
  found = [n for n in _imports(_parse(file)) if _is_part_of(n, *FLAG_MODULES)]
  assert not found, f"{file} imports {found}; take a dataclass instead"


@pytest.mark.parametrize("file", PACKAGE_FILES)
def test_file_is_short_enough_to_read(file):
  if pathlib.Path(file).name.startswith("kernel"):
    return  # One kernel is one file, whatever its length.
  lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
  assert lines <= MAX_LINES, f"{file} has {lines} lines; split it by meaning"


def test_rules_see_what_they_forbid():
  tree = ast.parse(
    "def f():\n"
    "  import torch.nn\n"
    "  from absl import app, logging\n"
    "  from ml_collections import config_flags\n"
  )
  found = _imports(tree)
  assert {n for n in found if _is_part_of(n, "torch")} == {"torch.nn"}
  assert {n for n in found if _is_part_of(n, *FLAG_MODULES)} == {
    "absl.app",
    "ml_collections.config_flags",
  }


# --- Configs ------------------------------------------------------------------


@pytest.mark.parametrize("file", _files("configs"))
def test_config_shows_its_command_and_loads(file):
  spec = importlib.util.spec_from_file_location("config_file", ROOT / file)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert re.search(rf"python -m \S+ .*--config={file}", module.__doc__ or ""), (
    f"{file}: the docstring must name a command that uses it"
  )
  assert isinstance(module.get_config(), Config)


# --- Installation -------------------------------------------------------------


def _pins() -> dict[str, str]:
  lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
  pins = {}
  for line in lines:
    if line and not line.startswith("#"):
      name, version = line.split("==")
      pins[_normal(name)] = version
  return pins


def _normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def test_pins_meet_every_requirement(setup_cfg):
  wanted = setup_cfg["options"]["install_requires"]
  for extra in PINNED_EXTRAS:
    wanted += setup_cfg["options.extras_require"][extra]
  pins = _pins()
  for line in wanted.split():
    requirement = Requirement(line)
    version = pins.get(_normal(requirement.name))
    assert version, f"constraints.txt does not pin {requirement.name}"
    assert version in requirement.specifier, f"{line} forbids {version}"


def test_every_import_is_a_stated_requirement(setup_cfg):
  lines = setup_cfg["options"]["install_requires"].split()
  for extra in setup_cfg["options.extras_require"].values():
    lines += extra.split()
  stated = {_normal(Requirement(line).name) for line in lines}
  owners = importlib.metadata.packages_distributions()
  foreign = {
    name.split(".")[0]: file
    for file in [*PACKAGE_FILES, *_files("configs")]
    for name in _imports(_parse(file))
  }
  missing = {
    name: foreign[name]
    for name in foreign.keys() - OURS - sys.stdlib_module_names
    if not stated & {_normal(owner) for owner in owners.get(name, [name])}
  }
  assert not missing, "setup.cfg does not ask for what these files import"


def test_no_torch_among_the_packages(setup_cfg):
  assert "torch" not in _pins()
  assert "torch" not in str(dict(setup_cfg["options.extras_require"]))


def test_installs_the_two_libraries_only(setup_cfg):
  found = setup_cfg["options.packages.find"]["include"].split()
  assert found == ["dflash_jax*", "pallas_kernels*"]


def test_data_of_packages_is_installed(setup_cfg):
  patterns = {
    package: patterns.split()
    for package, patterns in setup_cfg["options.package_data"].items()
  }
  for package in ("dflash_jax", "pallas_kernels"):
    found = (ROOT / package).rglob("*")
    data = {f for f in found if f.is_file() and f.suffix not in (".py", ".pyc")}
    for pattern in patterns.get(package, []):
      matched = set((ROOT / package).glob(pattern))
      assert matched, f"{package}: no file is {pattern}"
      data -= matched
    assert not data, f"setup.cfg does not install {data}"


def test_extra_for_compiling_is_what_compiling_needs(setup_cfg):
  extra = setup_cfg["options.extras_require"]["aot"].split()
  assert {Requirement(line).name for line in extra} == set(ahead.PARTS)


def test_everything_that_is_proven_runs_in_ci():
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
  steps = re.findall(r"^make (\S+)$", ci, re.MULTILINE)
  assert steps == ["lint", "test", "pages", "kernels", "aot"]
  for step in steps:
    assert re.search(rf"^{step}: .*  ## \S", makefile, re.MULTILINE), step


def test_setup_does_not_name_a_registry_or_a_home():
  texts = ["setup.cfg", "pyproject.toml", "constraints.txt", "Makefile"]
  for file in [*texts, ".ci/run", "tools/find_python.sh"]:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not re.search(r"https?://|/root/|/home/\w", text), file


# --- The search for an interpreter --------------------------------------------


def _find_python(**variables: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [ROOT / "tools" / "find_python.sh"],
    env=variables,
    capture_output=True,
    text=True,
    timeout=60,
  )


def _script(folder: pathlib.Path, name: str, text: str) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
  (folder / name).chmod(0o755)


def test_python_found_behind_a_broken_shim(tmp_path):
  _script(tmp_path / "shims", "python3.12", "echo not here >&2; exit 127")
  _script(tmp_path / "bin", "python3.12", f'exec "{sys.executable}" "$@"')
  found = _find_python(PATH=f"{tmp_path}/shims:{tmp_path}/bin")
  assert found.returncode == 0, found.stderr
  assert pathlib.Path(found.stdout.strip()).samefile(sys.executable)


def test_python_found_among_pyenv_versions(tmp_path):
  folder = tmp_path / "pyenv" / "versions" / "3.13.1" / "bin"
  _script(folder, "python3.13", f'exec "{sys.executable}" "$@"')
  found = _find_python(PATH="", PYENV_ROOT=f"{tmp_path}/pyenv")
  assert found.returncode == 0, found.stderr
  assert pathlib.Path(found.stdout.strip()).samefile(sys.executable)


def test_no_python_is_said_once_with_the_remedy(tmp_path):
  found = _find_python(PATH="", HOME=str(tmp_path))
  assert found.returncode == 1
  assert not found.stdout
  assert "apt-get install" in found.stderr and "pyenv install" in found.stderr


def test_named_python_must_work():
  found = _find_python(PATH="/bin", PYTHON="/bin/true")
  assert found.returncode == 1
  assert "PYTHON=/bin/true" in found.stderr
