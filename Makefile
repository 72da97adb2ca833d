# What can one do with a checkout? `make help` says.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# More than 4 only wait for the longest group of tests (tests/conftest.py says what one is), and each has 2 GiB.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help train test test-all lint gpu clean

help:
	@echo 'make train      watch one model being trained on two islands over a slow link (about 2 minutes)'
	@echo 'make test       the tests, without the slow ones'
	@echo 'make test-all   all tests that need no GPU'
	@echo 'make lint       ruff and pyright'
	@echo 'make gpu        the checks that need a CUDA device; installs nothing, needs torch, triton, numba and numpy'
	@echo 'make clean      remove what building and testing left behind; runs/ and $(VENV) stay'
	@echo
	@echo 'The first four make $(VENV), and install again only when pyproject.toml or .ci/constraints.txt changed. Then count:'
	@echo '  PYTHON=python3.12   the interpreter; a torch >= 2.11 that it has is used, not downloaded'
	@echo '  TORCH_INDEX=URL     where torch is taken from, as https://download.pytorch.org/whl/cu130'
	@echo '  VENV=PATH           another environment, new or already there, as VENV=$$VIRTUAL_ENV'

$(STAMP): pyproject.toml .ci/constraints.txt
	@PYTHON='$(PYTHON)' VENV='$(VENV)' TORCH_INDEX='$(TORCH_INDEX)' .ci/install
	@touch '$(STAMP)'

train: $(STAMP)
	@$(BIN)/dtrain run launch/jobs/quickstart.toml --fresh-name

test: $(STAMP)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not gpu'

test-all: $(STAMP)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not gpu'

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/python -m pyright --pythonpath $(BIN)/python

gpu:
	@$(PYTHON) -c 'import importlib.util as u; gone = [m for m in ("torch", "triton", "numba", "numpy") if not u.find_spec(m)]; \
	    raise SystemExit(f"$(PYTHON) has no {gone[0]}; name an interpreter that has it: make gpu PYTHON=/path/to/python" if gone else 0)'
	@PYTHONPATH=. $(PYTHON) -m tests.gpu

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find dtrain/ kernels launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
