# Everything is set up inside this folder, in $(VENV); only package managers' caches lie outside.
# `make demo TORCH=cpu` takes a PyTorch without CUDA, which is 4 GB smaller; TORCH=auto the one that fits the GPU.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN := $(VENV)/bin
TORCH_BACKEND := $(if $(TORCH),--torch-backend=$(TORCH))
# One thread for each of pytest's processes; more would fight over the cores. Text files without an encoding are errors.
PYTEST := OMP_NUM_THREADS=1 PYTHONWARNDEFAULTENCODING=1 $(BIN)/python -m pytest
# Packages are compiled once, here. Else each process that imports them first compiles 5,000 files, which takes 13 s.
export UV_COMPILE_BYTECODE := 1

OLDEST := .venv-oldest

.PHONY: demo test test-fast test-slow test-oldest lint lint-windows docs format clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

# Lint beside the tests: its type checker is one process.
test: $(VENV)/.installed
	$(MAKE) --no-print-directory -j 2 lint test-fast

test-fast: $(VENV)/.installed
	$(PYTEST) -n 2

# Full-size parity with the sam2 package, end-to-end runs: needs about an hour on 2 cores.
test-slow: $(VENV)/.installed-bench
	$(PYTEST) -m slow

# The tests with the lowest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/.installed
	$(BIN)/uv pip list --python $(OLDEST)/bin/python | \
	    grep -E '^(accelerate|av|bitsandbytes|datasets|gradio|huggingface|numpy|peft|pillow|torch|transformers)'
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	NODE_OPTIONS=--max-semi-space-size=64 $(BIN)/basedpyright --level error

# The types of Windows, where some modules are missing.
lint-windows: $(VENV)/.installed
	$(BIN)/basedpyright --level error --pythonplatform Windows

# The guides and the API reference, in site/.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) outputs site .pytest_cache .ruff_cache *.egg-info

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or later is needed: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): PyTorch, transformers, this package and its tools. It takes some minutes, most of them"
	@echo "for downloads, and 6 GB, of which 4 GB are CUDA's (not with TORCH=cpu). It is done once."
	@echo "1. A virtual environment, and uv, which installs packages"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo "2. The packages"
	$(BIN)/uv pip install --python $(BIN)/python $(TORCH_BACKEND) -e '.[dev,app]'
	@echo "Set up: $$(du -sh $(VENV) | cut -f1) in $(VENV)"
	touch $@

# sam2's build imports torch, and its CUDA extension is not needed.
$(VENV)/.installed-bench: $(VENV)/.installed
	@echo "Installing the sam2 package, which the slow tests compare with"
	SAM2_BUILD_CUDA=0 $(BIN)/uv pip install --python $(BIN)/python $(TORCH_BACKEND) --no-build-isolation \
	    -e '.[dev,app,bench]' setuptools
	touch $@

$(OLDEST)/.installed: pyproject.toml $(VENV)/.installed
	$(PYTHON) -m venv --clear $(OLDEST)
	$(BIN)/uv pip install --python $(OLDEST)/bin/python $(TORCH_BACKEND) --resolution lowest-direct -e '.[dev,app]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/uv pip install --python $(BIN)/python $(TORCH_BACKEND) -e '.[dev,app,docs]'
	touch $@
