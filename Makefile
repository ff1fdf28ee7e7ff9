# Needed: make and Python 3.11 or newer with venv (Debian: apt-get install make python3-venv).
# Every target makes its own environment, .venv; see `make help`.

PYTHON ?= python3
OUT ?= runs/tour
PYTEST_ARGS ?=
FUZZ_ARGS ?=
SHELL := /bin/sh
RUN := .venv/bin/python -m
export PYTHON TORCH_INDEX

.DEFAULT_GOAL := help
.PHONY: help environment demo test test-slow fuzz lint parity bench docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.12, TORCH_INDEX=URL of an index with torch for CPUs, OUT=folder of the demo,"
	@echo "           PYTEST_ARGS='-k lens', FUZZ_ARGS='--reader pairs --seed 1', PEER=checkout of EAP-IG for parity and bench"

environment: ## make or update .venv; the other targets do it themselves
	@sh tools/environment.sh

demo: environment ## a tour of the shipped model, and where its page is
	@$(RUN) cutaway tour atlas --out "$(OUT)"

test: environment ## the tests, but for the slow ones
	$(RUN) pytest -m "not slow" $(PYTEST_ARGS)

test-slow: environment ## the slow tests
	@# pytest's 5 means that nothing was collected: as long as no test is slow, that is as it should be
	@$(RUN) pytest -m "slow and not parity" $(PYTEST_ARGS) || { code=$$?; \
	  if [ $$code = 5 ]; then echo "there are no slow tests"; else exit $$code; fi; }

fuzz: environment ## spoil every kind of file that is read, 250 times each (minutes); failures go to runs/fuzz
	.venv/bin/python tools/fuzz.py $(FUZZ_ARGS)

lint: environment ## ruff, pyright, the contract between the floors, what users meet in numbers
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright
	.venv/bin/lint-imports --no-logo
	SKIP=ruff-check,ruff-format .venv/bin/pre-commit run --all-files
	.venv/bin/python tools/surface.py --check

parity: environment ## build the peers' environments (.venvs), run the tests against them
	.venv/bin/python tools/parity.py $(if $(PEER),--checkout "$(PEER)")

bench: environment ## measure speed beside the peers (minutes); results go to runs/bench
	.venv/bin/python tools/parity.py --build-only
	.venv/bin/python benchmarks/run.py
	.venv/bin/python benchmarks/dictionaries.py
	.venv/bin/python benchmarks/model_access.py
	.venv/bin/python benchmarks/circuits.py $(if $(PEER),--peer "$(PEER)")

docs: environment ## write the generated pages of docs/ again
	.venv/bin/python tools/docs.py --measure

clean: ## remove what tools leave behind; environments and runs stay
	find src tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
