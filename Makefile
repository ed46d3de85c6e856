# `make search` finds a front; `make check` and `make test` check the code. Each first makes .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PYTEST := $(BIN)/pytest --numprocesses $(JOBS)
# -qq leaves pip its errors and takes its warnings
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
PIP_FAILED = { echo 'the whole story: $(BIN)/python -m pip install -c constraints.txt -e .' >&2; exit 1; }

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help search studies check test lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'PYTHON=python3.11 names the Python for .venv; ARGS="--name x --trials 32" goes to `vitfront run`,'
	@echo 'ARGS="-k plan" to pytest, which runs JOBS=2 processes'

search: $(VENV)/.installed  ## find the front of the digits recipe (ARGS for another)
	@$(BIN)/vitfront run $(ARGS)

studies: $(VENV)/.installed  ## the papers' questions, asked of the digits: tables and figures in runs/
	@for study in cutoff noise tokens order width-or-depth budgets; do $(BIN)/vitfront study $$study; done

check: lint  ## lint, types, import rules and the quick tests, in minutes
	@$(PYTEST) -m 'not slow' $(ARGS)

test: lint  ## lint, types, import rules and all tests: what CI runs
	@$(PYTEST) $(ARGS)

lint: $(VENV)/.installed-dev
	@echo 'ruff check' && $(BIN)/ruff check
	@echo 'ruff format' && $(BIN)/ruff format --check
	@echo 'mypy' && $(BIN)/mypy
	@echo 'lint-imports' && $(BIN)/lint-imports

clean:  ## remove .venv and the caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'installing into $(VENV) (about 2.5 minutes, 6.5 GB)'
	@$(PIP) --editable . || $(PIP_FAILED)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo 'installing into $(VENV) with the tools for the tests (about 2.5 minutes, 6.5 GB)'
	@$(PIP) --editable '.[dev]' || $(PIP_FAILED)
	@touch $(VENV)/.installed $@

# pip is the last thing that venv makes, so a half-made .venv is made again
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 10) <= sys.version_info < (3, 13) else \
	    "vitfront needs Python 3.10 to 3.12, this is %d.%d; name one: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV)
