# make demo   fine-tune a small model with sloth, and compare with eager and Inductor
# make demo-qlora   the same model in 4 bits, adapters trained through TRL, and compared with eager
# make test   lint, format check, types of the public API, and the test suite
# make lint   the first three alone
# make nightly  what the default tier leaves out: slow tests, further combinations and examples, all compile targets
# make faults  plant faults, and write down which test catches each
# make sweep  the slow sweep over masks and mutants
# make zoo    train a tiny model of every architecture beside eager, and compare with the last result
# Both share one environment, .venv, which is brought up to date when pyproject.toml, TORCH, TRITON or TRANSFORMERS changes.

PYTHON ?= python3
# Installed first and by itself, so that the build which this machine's pip offers (CPU, CUDA, ROCm) is the one taken.
TORCH ?= torch==2.13.0
# The CPU builds of torch name no Triton, and the newest need not suit them: take the one that the CUDA builds ask for.
TRITON ?= $(if $(findstring ==2.13,$(TORCH)),triton==3.7.1,$(if $(findstring ==2.11,$(TORCH)),triton==3.6.0,triton))
# TRANSFORMERS=transformers==5.17.0: the oldest that is tested.
TRANSFORMERS ?= transformers
# The demo's own folder is replaced each time; `python examples/finetune.py` never replaces one unasked.
DEMO ?= --out runs/demo --force
QLORA ?= --out runs/qlora --force

VENV := .venv
BIN := $(VENV)/bin
# The name of the stamp holds a checksum of what is asked for: another choice is another stamp.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(TORCH) $(TRITON) $(TRANSFORMERS)' | cksum | cut -d ' ' -f 1)

.PHONY: help demo demo-qlora lint test nightly faults sweep zoo clean
.DELETE_ON_ERROR:

help:
	@echo "make demo | demo-qlora | lint | test | nightly | faults | sweep | zoo | clean   (TORCH=$(TORCH), PYTHON=$(PYTHON); DEMO=, QLORA=\"options\")"

$(STAMP): pyproject.toml
	@echo "== environment: $(VENV), $(TORCH)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	@$(BIN)/python -m pip install -q '$(TORCH)'
	@echo "== environment: sloth and what it needs"
	@$(BIN)/python -m pip install -q '$(TRITON)' '$(TRANSFORMERS)' -e '.[test,train]'
	@touch $@

demo: $(STAMP)
	@echo "== demo: examples/finetune.py"
	@$(BIN)/python examples/finetune.py $(DEMO)

demo-qlora: $(STAMP)
	@echo "== demo: examples/qlora.py"
	@$(BIN)/python examples/qlora.py $(QLORA)

lint: $(STAMP)
	@echo "== lint"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p $(VENV)/typed && ln -sfn ../../src $(VENV)/typed/sloth
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

test: lint
	@echo "== tests"
	@$(BIN)/python -m pytest -n 2 --dist worksteal

nightly: $(STAMP)
	@echo "== nightly"
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m nightly
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m 'hypothesis and not nightly and not sweep' --hypothesis-profile nightly
	@SLOTH_TESTS_INNER=aot_eager $(BIN)/python -m pytest -n 2 --dist worksteal tests/patterns tests/rewriter tests/test_recipes.py

faults: $(STAMP)
	@echo "== faults"
	@$(BIN)/python -m tests.faults

sweep: $(STAMP)
	@echo "== sweep"
	@$(BIN)/python -m pytest -m sweep

# What runs/zoo.json holds of this code and these versions is not run again.
zoo: $(STAMP)
	@echo "== zoo"
	@$(BIN)/python -m sloth zoo --jobs 2 --out runs/zoo.json --compare benchmarks/results/zoo.json

clean:
	@echo "== removing the environment, runs and caches"
	@rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache .hypothesis *.egg-info src/*.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
