# A .venv is made when missing; PYTHON can name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   answer a question about a bundled picture with 64 of 576 vision tokens, offline"
	@echo "make test   ruff, pyright and pytest"
	@echo "make bench  time the selection, and the bundled model with and without it"

$(STAMP): pyproject.toml constraints/tested.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/tested.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/visiontrim ask examples/shapes.png "what color is the star?" --keep 64 --compare --map kept.png

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest

bench: $(STAMP)
	$(BIN)/python benchmarks/ltam.py
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
