# Two commands do everything on a fresh machine with Python 3.11+ and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench lint format docs clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# A stamp file for each set of requirements: the second call installs nothing.
$(VENV)/.run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "ppl_vae needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,docs]"
	@touch $@

demo: $(VENV)/.run  ## the main job: train on digits, judge on held-out digits, draw (figures in runs/demo)
	$(BIN)/ppl-vae train --config examples/demo.toml --out $(RUN) --force
	$(BIN)/ppl-vae evaluate $(RUN) --particles 1000

test: $(VENV)/.dev lint  ## lint, type-check and the whole suite, less what is slow or needs data or a GPU
	$(BIN)/python -m pytest -n 2 -m "not slow and not data and not gpu"

test-all: $(VENV)/.dev lint  ## everything; what the machine lacks is skipped with a reason
	$(BIN)/python -m pytest -ra

bench: $(VENV)/.dev  ## time the project against its peers (options: make bench BENCH="--device cuda")
	$(BIN)/python tests/bench/run.py $(BENCH)

lint: $(VENV)/.dev  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev  ## build the documentation into site/, warnings are errors
	$(BIN)/mkdocs build --strict

clean:  ## remove what make made
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache
