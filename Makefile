# tiermem: every target sets up what it needs, from a bare clone on. `make help` lists them.
#   VENV=DIR      where the virtual environment is (.venv)
#   PYTHON=PROG   the interpreter to make it with (the first of python3 with torch, python3.11, python3, ...)

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready
BUILT := $(VENV)/.built
FRESH := $(VENV)/.fresh
CPP := CMakeLists.txt $(shell find native bindings -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt)
JOBS ?= $(shell nproc)

# The environment's programs first: cmake and ninja are there when the system has none.
export PATH := $(abspath $(BIN)):$(PATH)
# Torch's threads sleep while they wait for each other. By default they spin, which on a busy machine takes the
# cores from those that are waited for.
export OMP_WAIT_POLICY ?= passive
# Else every program that a test starts would compile what it imports again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup build demo test test-native test-gpu torture fuzz check format sanitize clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(BUILT) ## make .venv with everything for development, and build the extension

# This builds the extension as well: FRESH tells the rule of BUILT that nothing is left to do.
$(READY): pyproject.toml constraints.txt scripts/make_venv.sh
	sh scripts/make_venv.sh $(VENV)
	@touch $@ $(FRESH)

build: $(BUILT) ## rebuild the extension if C++ changed

$(BUILT): $(READY) $(CPP)
	@test -e $(FRESH) || { echo building the extension; $(PIP) install -q --no-build-isolation --no-deps -e .; }
	@rm -f $(FRESH)
	@touch $@

# Stop with a clear message when the packages $(1) that a target needs could not be installed.
need = @for module in $(1); do $(BIN)/python -c "import $$module" 2>/dev/null || { \
  echo "make $@: needs the Python package $$module, which $(VENV) lacks and no package index had" >&2; exit 2; }; done

demo: $(BUILT) ## generate text with a hot tier several times too small; compare with the untiered run
	$(call need,transformers safetensors lmdb)
	$(BIN)/tiermem generate --model models/reference --prompt-file examples/long_prompt.txt \
	  --gpu 8MiB --ram 24MiB --ssd 1GiB --max-new-tokens 64 --verify

# Four at once on any machine: many tests wait for disks, other processes and deadlines.
test: test-native $(BUILT) ## all tests that need no GPU
	$(call need,pytest pytest_timeout hypothesis xdist lmdb)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 4 --dist worksteal --durations 12

test-native: build/native/ready ## the C++ tests of the native core
	ctest --test-dir build/native --output-on-failure --parallel $(JOBS)

# The extension's own core is tested, where it was built here: compiling another one takes a minute.
build/native/ready: $(BUILT) $(CPP)
	cmake -S native -B build/native -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTIERMEM_WERROR=ON \
	  -DTIERMEM_CORE="$$(ls -t $$PWD/build/*/native/libtiermem_core.a 2>/dev/null | head -n 1)"
	cmake --build build/native --parallel $(JOBS)
	@touch $@

test-gpu: $(BUILT) ## the tests that need an NVIDIA GPU
	$(call need,pytest pytest_timeout)
	$(BIN)/python -m pytest -m gpu

# MINUTES=N, SEED=N: other cases or the same again; KIND=NAME, and CASE=N for one case of it; SAVE=FILE: the counts as JSON
torture: $(BUILT) ## the fault suite for MINUTES=20: kills, failing disks, flipped bits, memory over time
	$(call need,lmdb)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m torture --minutes $(or $(MINUTES),20) \
	  $(if $(SEED),--seed $(SEED)) $(if $(KIND),--kind $(KIND)) $(if $(CASE),--case $(CASE)) $(if $(SAVE),--save $(SAVE))

fuzz: $(BUILT) ## every parser of tiermem with coverage-guided inputs for MINUTES=10, where atheris is installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m torture.fuzz --minutes $(or $(MINUTES),10) \
	  $(if $(CORPUS),--corpus $(CORPUS))

check: $(BUILT) ## format, lint, strict types, import layers
	$(call need,ruff mypy pytest)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

format: $(READY) ## bring the Python files into form
	$(call need,ruff)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sanitize: $(READY) ## the C++ tests under the address, undefined-behaviour and thread sanitizers
	@for kind in address thread; do \
	  cmake -S native -B build/$$kind -DTIERMEM_SANITIZE=$$kind -DTIERMEM_WERROR=ON \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo && \
	  cmake --build build/$$kind --parallel $(JOBS) && \
	  ctest --test-dir build/$$kind --output-on-failure || exit 1; \
	done

clean: ## remove what was built, but not .venv
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
