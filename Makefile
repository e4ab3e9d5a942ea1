# From a fresh clone: `make train` pretrains a small model, `make test` tests the project. Each sets up .venv by itself.

.DEFAULT_GOAL := help
.PHONY: help train test test-full test-gpu lint clean

ARGS ?=#       overrides of `make train`, as in ARGS="name=second optim=adamw"
TESTS ?= tests#  what `make test` runs
WORKERS ?= 2#    processes that share out the tests

# The first of these that is a supported version; `make PYTHON=/path/to/python3.12 train` chooses another.
SUPPORTED = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
BIN = .venv/bin

help:
	@echo "make train [ARGS='key=value ...']  pretrain a small model on Python's standard library; ARGS as for k2train train"
	@echo "make test [TESTS=tests/model]      the quick tests"
	@echo "make test-full                     all tests, the slow ones too"
	@echo "make test-gpu                      the tests that need a CUDA device"
	@echo "make lint                          style and types"
	@echo "make clean                         remove .venv and caches; runs/ stays"

train: .venv/installed-train
	@$(BIN)/k2train train $(ARGS)

# One thread a process: the workers and the ranks of distributed tests share out the cores.
test: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not full" $(TESTS)

test-full: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(TESTS)

test-gpu: .venv/installed-dev
	@$(BIN)/python -m pytest -q -m gpu $(TESTS)

lint: .venv/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/bin/python:
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' 2>/dev/null || { echo "k2train needs Python 3.10 to 3.13, and \
	$(if $(PYTHON),$(PYTHON) is not one,none is on the PATH): make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# pip's settings (index, cache, proxy) are those of its own configuration and of PIP_... in the environment.
.venv/installed-train: pyproject.toml | .venv/bin/python
	@echo "installing k2train and what it trains with into .venv (once; some minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[train]'
	@touch $@

.venv/installed-dev: .venv/installed-train
	@echo "installing what tests and lint need into .venv (once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@
