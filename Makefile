# Everything is set up inside this folder, in $(VENV); only package managers' caches lie outside.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread for each of pytest's processes; more would fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-slow lint format clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed lint
	$(PYTEST) -n 2

# Full-size parity with the sam2 package, end-to-end runs: needs about an hour on 2 cores.
test-slow: $(VENV)/.installed-bench
	$(PYTEST) -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache *.egg-info

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "Python 3.10 or later is needed: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	touch $@

# sam2's build imports torch, and its CUDA extension is not needed.
$(VENV)/.installed-bench: $(VENV)/.installed
	SAM2_BUILD_CUDA=0 $(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation -e '.[dev,bench]' setuptools
	touch $@
