# Everything runs in its own virtual environment; only Python >= 3.11, pip and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test test-browser test-all lint format clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "DeltaServe needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	@touch $@

demo: $(STAMP)  ## Train, compress and serve a small family of models; check their answers
	$(BIN)/deltaserve demo

test: $(STAMP)  ## Run the tests (those that need a GPU, a browser or minutes are left out)
	$(BIN)/python -m pytest -m "not gpu and not slow and not browser"

test-browser: $(STAMP)  ## Run the console's tests in headless Chromium, which must be installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[browser]'
	$(BIN)/python -m pytest -m browser

test-all: $(STAMP)  ## Run all tests, the slow ones too
	$(BIN)/python -m pytest

lint: $(STAMP)  ## Style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
