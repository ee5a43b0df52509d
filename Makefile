# A .venv is made when missing; PYTHON can name another interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What make table compares.
TABLE := all,visiontrim:variant=lean,visiontrim:variant=release
# every method for videos, and some for pictures beside them
VIDEO := aot,dycoke,evs,fastvid,flashvid,holitom,holitom-inner,st-gridpool,v-cast,vidcom2,visiontrim,divprune,fastv
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/tested.txt

RESULTS := benchmarks/results
SPEED := $(RESULTS)/bundled-cpu.json $(RESULTS)/llava-7b-slice-cpu.json

.PHONY: help demo test table table-natural table-clips table-standard table-hard table-canvases bench matrix serving install-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   answer a question about a bundled picture with 64 of 576 vision tokens, offline"
	@echo "make test   ruff, pyright and pytest"
	@echo "make table  score every method on the bundled models into docs/results and the README; make table-natural takes a"
	@echo "            quarter of an hour, all of it some four hours of one core, without the stored answers"
	@echo "make bench  speed and memory: of selections, beside official-style code, of models, a dry run of the GPU's program;"
	@echo "            what is stored in benchmarks/results is printed, what is missing there measured"
	@echo "make matrix test the families on four releases of transformers, and with optional packages"
	@echo "make install-check  install the wheel as a user would, with the newest releases, and try it"
	@echo "make serving test the plug-in for vLLM, in an environment of its own with vLLM for the CPU"

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
	$(BIN)/visiontrim ask examples/shapes.png "what color is the star?" --keep 64 --method visiontrim:variant=lean \
		--compare --map kept.png

test: $(VENV)/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright & types=$$!; $(BIN)/pytest -n auto --dist worksteal; tests=$$?; wait $$types && exit $$tests  # pyright needs one core for a minute

table: table-natural table-clips table-standard table-hard table-canvases
	$(BIN)/visiontrim zoo validity --out docs/results/table
	$(BIN)/python benchmarks/tables.py

table-standard: $(VENV)/.runs
	$(BIN)/visiontrim eval --methods $(TABLE) --keep 192,128,64,32 --scenes 44 --threads 1 --out docs/results/table

table-natural: $(VENV)/.runs
	$(BIN)/visiontrim eval --model bundled-natural --methods $(TABLE) --keep 192,128,64 --scenes 20 --threads 1 \
		--out docs/results/natural
	$(BIN)/python benchmarks/tables.py

table-clips: $(VENV)/.runs
	$(BIN)/visiontrim eval --suite clips --model bundled-video --methods $(VIDEO) --keep 192,96 --scenes 20 --threads 1 \
		--out docs/results/clips
	$(BIN)/python benchmarks/tables.py

table-hard: $(VENV)/.runs
	$(BIN)/visiontrim eval --split hard --methods $(TABLE) --keep 64 --scenes 24 --threads 1 --out docs/results/hard

table-canvases: $(VENV)/.runs
	$(BIN)/visiontrim eval --suite canvases --model bundled-qwen --methods $(TABLE) --keep 128,64,32 --scenes 24 --threads 1 \
		--out docs/results/canvases

bench: $(VENV)/.runs $(SPEED)
	$(BIN)/python benchmarks/ltam.py
	$(BIN)/python benchmarks/selection.py --out $(RESULTS)/selection.jsonl
	$(BIN)/python benchmarks/peers.py --out $(RESULTS)/peers-cpu.json --page
	$(BIN)/python benchmarks/gpu.py --device cpu --small --out $(VENV)/gpu-dry-run.json
	$(BIN)/python benchmarks/speed.py $(SPEED)

$(RESULTS)/bundled-cpu.json: | $(VENV)/.runs
	$(BIN)/visiontrim bench --method visiontrim --method random --keep 64 --batch 1 --batch 8 --answer 16 --rounds 20 \
		--threads 1 --out $@

$(RESULTS)/llava-7b-slice-cpu.json: | $(VENV)/.runs
	$(BIN)/visiontrim bench llava-1.5-7b --layers 4 --method visiontrim --keep 64 --answer 4 --rounds 7 --out $@

matrix: | $(BIN)/python
	$(BIN)/python tests/matrix.py

install-check: $(VENV)/.runs
	$(BIN)/python tests/install_check.py

serving: | $(BIN)/python
	$(BIN)/python packages/visiontrim-vllm/environment.py .serving

clean:
	rm -rf $(VENV) .matrix .install .serving .peers .pytest_cache .ruff_cache .hypothesis
