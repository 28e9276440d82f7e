# Two commands do everything on a fresh machine with Python 3.11: `make quickstart` and `make test`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
# Exact, tested versions. torch comes first: its pinned version is a CPU build, an open range would pull CUDA.
PINS   := requirements/constraints.txt
STAMP  := $(VENV)/.installed

# In the order of their collection, which puts modules of few long tests before those of many short ones.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help

.PHONY: help
help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

$(STAMP): pyproject.toml $(PINS)
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}: pass PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --disable-pip-version-check --constraint $(PINS) torch
	$(PIP) install --quiet --disable-pip-version-check --constraint $(PINS) --editable '.[dev]'
	touch $@

.PHONY: install
install: $(STAMP)  ## Create .venv and install everything with the tested versions

.PHONY: quickstart
quickstart: $(STAMP)  ## Install, then run real models: embeddings, text generation, validation
	$(BIN)/python examples/quickstart.py

.PHONY: test
test: $(STAMP)  ## Install, then run the tests (about 25 minutes on 2 cores)
	$(PYTEST) -m "not sweep"

.PHONY: test-all
test-all: $(STAMP)  ## The tests and what only repeats them for further families and formats
	$(PYTEST)

.PHONY: lint
lint: $(STAMP)  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: bench-export
bench-export: $(STAMP)  ## Measure memory and time of an export at 0.1, 1 and 8 billion parameters (needs 20 GB of disk)
	$(BIN)/python benchmarks/export.py --output docs/export_cost.md

.PHONY: bench-finetune
bench-finetune: $(STAMP)  ## Measure step time and memory of fine-tuning against PEFT and the HF Trainer (about 20 minutes, alone)
	$(BIN)/python benchmarks/finetune.py --with-compile --output docs/finetuning_performance.md

.PHONY: bench
bench: $(STAMP)  ## Measure speed, memory and quality beside the peers that are installed (alone; ARGS="--quick" for little)
	$(BIN)/python benchmarks/performance.py $(ARGS)

.PHONY: bench-numerics
bench-numerics: $(STAMP)  ## Measure on the host what a card's number formats cost (about 3 minutes), write docs/cloud_ai_numerics.md
	$(BIN)/python benchmarks/numerics.py --output docs/cloud_ai_numerics.md

# The files pin every package, so pip has nothing to resolve; see benchmarks/peers/README.md.
PEERS := benchmarks/peers/.venvs
.PHONY: bench-peers
bench-peers: $(patsubst benchmarks/peers/requirements/%.txt,$(PEERS)/%/.installed,$(wildcard benchmarks/peers/requirements/*.txt))  ## Create an environment per peer of `make bench`

$(PEERS)/%/.installed: benchmarks/peers/requirements/%.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	touch $@

.PHONY: model-coverage
model-coverage: $(STAMP)  ## Compare many model families with Hugging Face (about 10 minutes), write docs/models.md
	$(BIN)/python benchmarks/model_coverage.py --output docs/models.md

.PHONY: kill-test
kill-test: $(STAMP)  ## Kill exports and compiles 30 times at random moments and check that nothing is left half-done
	$(BIN)/python benchmarks/kill_test.py examples/demo_model/model

.PHONY: resume-test
resume-test: $(STAMP)  ## Kill a fine-tuning run at 10 random moments and check that resuming gives the same bits
	$(BIN)/python benchmarks/resume_test.py examples/demo_model/model sample --steps 12 --max-ctx-len 128

.PHONY: clean
clean:  ## Remove the environment and caches of tools
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info

.PHONY: requirements
requirements:  ## Write requirements/*.txt from pyproject.toml
	$(PYTHON) requirements/generate.py

.PHONY: docs
docs: $(STAMP)  ## Write the pages that are made from the code
	$(BIN)/python -m QEfficient.finetune.option_table docs/finetuning_options.md
	$(BIN)/python -m QEfficient.finetune.foreign.tables docs/migration.md
