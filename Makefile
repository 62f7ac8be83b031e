# Needs Python 3.11 or 3.12 with pip, nothing else: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
DIST ?= dist

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: help demo test test-all doctest lint format types docs docs-check build dev clean
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

demo: $(VENV)/.base ## Train a small model, make it forget a digit, write the report
	@$(BIN)/expunge demo

test: $(VENV)/.dev ## The everyday tests
	@$(PYTEST) -m "not slow"

test-all: $(VENV)/.dev ## Every test, the slow ones too
	@$(PYTEST)

doctest: $(VENV)/.dev ## The examples in docstrings
	@$(BIN)/python -m pytest --doctest-modules src/expunge

lint: $(VENV)/.dev ## Style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.dev ## Put the style right
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(VENV)/.dev ## Static types of the package
	@$(BIN)/mypy

docs: $(VENV)/.dev ## Write method cards, metric list and compatibility matrix from the registry
	@$(BIN)/python -m expunge.cards

docs-check: $(VENV)/.dev ## Fail if the written cards are out of date
	@$(BIN)/python -m expunge.cards --check

build: $(VENV)/.dev ## Source archive and wheel, in $(DIST)/
	@$(PIP) hatchling
	@rm -rf $(DIST)
	@$(BIN)/python -m build --no-isolation --outdir $(DIST) .

dev: $(VENV)/.dev ## Install everything for development

clean: ## Remove what can be made again
	rm -rf $(DIST) build .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)

# Debian's python3 may lack ensurepip; then the pip that is there fills the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "needs Python 3.11 or newer, this is $$($(PYTHON) --version); try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $@ install pip; }

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing expunge into $(VENV) (once, a few minutes) ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing expunge with its development tools into $(VENV) (once, a few minutes) ..."
	@$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.base
