# `make demo` and `make test` are all that a fresh machine needs: Python 3.11 or newer, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# One thread a process: tests run two at a time, and tiny networks get slower with more.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help env demo train-cartpole test test-all check lint types docs mutation clean

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

env: $(READY) ## Create .venv with the pinned constraints

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| (echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: env ## Fine-tune the embedded GPT-2 toward a toy reward, about three minutes on two CPU cores
	@$(BIN)/rlhf-ppo demo

train-cartpole: env ## Solve CartPole-v1 with the classic frontend
	@$(BIN)/classic-ppo train CartPole-v1

check: lint types

lint: env ## Lint and formatting
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .

types: env ## Types: strict on rlhf_ppo/core
	$(BIN)/basedpyright --level error

test: check ## Lint, types and the tests
	$(TEST_ENV) $(BIN)/pytest -n 2 -m "not slow"

test-all: check ## The same with the long learning runs
	$(TEST_ENV) $(BIN)/pytest -n 2

docs: env ## Make docs/metrics.md again from the metric dictionary
	$(BIN)/python -m rlhf_ppo.runtime.metrics > docs/metrics.md

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
