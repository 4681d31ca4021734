# Two commands matter: `make demo` and `make test`. Both set up everything they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-fast test-long lint format bench-features bench-finetune bench-few-labels bench-sentiment bench-adaptation bench-source-free bench-predict bench-serve bench-drift bench-gate demo-loop bench-overhead reference lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11, 4) <= sys.version_info < (3, 15), "headstart needs Python 3.11.4 to 3.14: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv --upgrade-deps $(VENV) # a new pip takes two thirds of the time of the one that came with Python 3.11
	$(BIN)/pip install --quiet --no-compile --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true # on all cores, pip on one; templates are no Python
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

setup: $(READY) ## install the locked environment into .venv

demo: $(READY) ## run both example recipes, from raw data to registered models
	$(BIN)/headstart run recipes/solar-cells.yaml recipes/sentiment.yaml
	@cat evidence/solar-cells/summary.md evidence/sentiment/summary.md

demo-loop: $(READY) ## another kind of cell, and of text, arrives without labels (after make demo)
	$(BIN)/python benchmarks/closed_loop.py

test: $(READY) ## run all tests but those of test-long: fast ones first, then slow ones
	$(BIN)/pytest -m "not long" -n 2 --dist loadgroup --durations 20

test-fast: $(READY) ## run the fast tests only
	$(BIN)/pytest -m "not slow and not long" -n 2

test-long: $(READY) ## the tests that take too long for every change: killed stacks, production stores, every write
	HEADSTART_EVERY=1 $(BIN)/pytest -m long -o faulthandler_timeout=0

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers auto

format: $(READY) ## apply the style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-features: $(READY) ## measure feature extraction against the plain way (after make demo)
	$(BIN)/python benchmarks/features.py

bench-finetune: $(READY) ## measure fine-tuning against plain loops, timm and Trainer (after make demo)
	$(BIN)/python benchmarks/finetune.py

bench-few-labels: $(READY) ## measure quality over the number of labels (after running the -tuned recipes)
	$(BIN)/python benchmarks/few_labels.py

.venv-peers/.ready: benchmarks/peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet -r benchmarks/peers.txt
	touch $@

bench-adaptation: $(READY) .venv-peers/.ready ## measure every way to adapt, ours and others' (after running the -tuned recipes)
	$(BIN)/python benchmarks/adaptation.py

bench-source-free: $(READY) ## measure going on without the source's rows (after running the -tuned recipes)
	$(BIN)/python benchmarks/source_free.py

bench-predict: $(READY) ## measure predicting many rows against asking row by row (after make demo)
	$(BIN)/python benchmarks/predict.py

bench-gate: $(READY) ## try a worse, an equal and a better candidate (after running sentiment-tuned)
	$(BIN)/python benchmarks/gate.py

bench-sentiment: $(READY) ## compare sentiment with rules (after both sentiment recipes have run)
	$(BIN)/python benchmarks/sentiment.py

bench-serve: $(READY) ## measure serving against mlflow models serve (after make demo)
	$(BIN)/python benchmarks/serve.py

bench-drift: $(READY) ## measure how often the monitor alarms, with and without drift (after make demo)
	$(BIN)/python benchmarks/drift.py

bench-overhead: $(READY) ## measure what Prefect adds to a run, a skipped run, and an idle stack's memory
	$(BIN)/python benchmarks/overhead.py

reference: $(READY) ## write the JSON schema and the generated reference pages anew
	$(BIN)/python docs/reference/generate.py

lock: $(READY) ## resolve requirements.lock anew
	uv pip compile pyproject.toml --extra dev --universal --generate-hashes \
		--no-emit-index-url --no-header --no-annotate --quiet --output-file requirements.lock

clean: ## remove the environment and every cache of the tools
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
