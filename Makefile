# A .venv is made when missing; PYTHON can name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/tested.txt

.PHONY: help demo test bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   answer a question about a bundled picture with 64 of 576 vision tokens, offline"
	@echo "make test   ruff, pyright and pytest"
	@echo "make bench  time the selection, and the bundled model with and without it"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runs: pyproject.toml constraints/tested.txt | $(BIN)/python
	$(INSTALL) -e .
	touch $@

$(VENV)/.tests: pyproject.toml constraints/tested.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	touch $@

demo: $(VENV)/.runs
	$(BIN)/visiontrim ask examples/shapes.png "what color is the star?" --keep 64 --compare --map kept.png

test: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest

bench: $(VENV)/.runs
	$(BIN)/python benchmarks/ltam.py
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
