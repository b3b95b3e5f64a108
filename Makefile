# A fresh machine needs Python 3.11 or newer and make, then `make demo` or `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An environment with trl==1.12.0 (and pandas); benchmarks/speed.py makes this one.
PEER ?= build/peer/bin/python
READY := $(VENV)/.ready
# One thread per process: tests run two at a time, and more threads slow tiny networks down.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

FIELDS := tests/rlhf_ppo/migration/dump_other_fields.py rlhf_ppo/assets/migration-fields.json
MUTATION := build/mutation
MUTATION_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HYPOTHESIS_PROFILE=mutation

.DEFAULT_GOAL := help
.PHONY: help env demo train-cartpole test test-all test-shake test-versions test-architectures soak check lint types docs trl-fields migration-fields audit mutation clean

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

env: $(READY) ## Create .venv with the pinned constraints

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| (echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: env ## Fine-tune the embedded GPT-2 toward a toy reward, about two minutes on two CPU cores
	@$(BIN)/rlhf-ppo demo

train-cartpole: env ## Solve CartPole-v1 with the classic frontend
	@$(BIN)/classic-ppo train CartPole-v1

check: lint types

lint: env ## Check lint and formatting
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check .

types: env ## Check types, strictly in rlhf_ppo/core
	$(BIN)/basedpyright --level error

test: check ## Run lint, types and tests
	$(TEST_ENV) $(BIN)/pytest -n 2 -m "not slow"

test-all: check ## The same with the slow tests
	$(TEST_ENV) $(BIN)/pytest -n 2

test-shake: env ## Run the tests as on other CPUs, and each learning test on twenty seeds; about half an hour
	$(TEST_ENV) $(BIN)/python -P tests/shake.py

test-versions: env ## Run the tests with the oldest and the newest transformers, peft, datasets and gymnasium allowed
	$(TEST_ENV) $(PYTHON) tests/versions.py

test-architectures: env ## Check a tiny model of every causal architecture; write the table of docs/models.md
	$(TEST_ENV) $(BIN)/python -P tests/architectures.py --write docs/models.md

soak: env ## Kill a tiny run of each frontend at each file-system step, then 200 times at random; then two processes
	$(TEST_ENV) $(BIN)/python -P tests/soak.py matrix
	$(TEST_ENV) $(BIN)/python -P tests/soak.py random --kills 200
	$(TEST_ENV) $(BIN)/python -P tests/soak.py matrix --rollouts 2 --processes 2
	$(TEST_ENV) $(BIN)/python -P tests/soak.py matrix --rollouts 2 --processes 2 --sharding full
	$(TEST_ENV) $(BIN)/python -P tests/soak.py random --kills 100 --rollouts 20 --processes 2
	$(TEST_ENV) $(BIN)/python -P tests/soak.py random --kills 30 --rollouts 20 --processes 2 --sharding full

docs: env ## Regenerate the generated pages and tables of docs/
	$(BIN)/python -m rlhf_ppo.runtime.logs.metrics > docs/metrics.md
	$(BIN)/python -m rlhf_ppo.runtime.diagnosis.advice > docs/tuning.md
	$(BIN)/python -m rlhf_ppo.settings_page > docs/settings.md
	$(BIN)/python -m classic.settings_page > docs/classic-settings.md
	$(BIN)/python -m rlhf_ppo.migration.page
	$(BIN)/python docs/module_map.py

trl-fields: ## Regenerate the fields of TRL 1.12's PPO config, with an interpreter that has trl: make trl-fields PEER=...
	$(PEER) tests/rlhf_ppo/migration/dump_trl_fields.py > build/trl-fields.json
	$(BIN)/python $(FIELDS) - trl=build/trl-fields.json

migration-fields: ## Regenerate the fields of the other projects that `rlhf-ppo migrate` reads, from their wheels
	mkdir -p build/wheels
	for wheel in trl==0.11.4 llamafactory==0.9.5 ms-swift==4.6.0 transformers==4.57.6; do \
	  $(BIN)/pip download --quiet --no-deps --dest build/wheels $$wheel && \
	  $(BIN)/python -m zipfile --extract build/wheels/$$(ls -t build/wheels | grep whl | head -1) build/wheels/$${wheel%%=*} || exit 1; \
	done
	$(BIN)/python $(FIELDS) build/wheels/transformers trl-0x=build/wheels/trl \
	  llama-factory=build/wheels/llamafactory ms-swift=build/wheels/ms-swift

audit: ## Check the pinned versions with PyPI's vulnerability service
	test -d build/audit || $(PYTHON) -m venv build/audit
	build/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

mutation: ## Run mutation tests of rlhf_ppo/core; more than an hour on one CPU core
	rm -rf $(MUTATION)/tree && mkdir -p $(MUTATION)/tree/rlhf_ppo $(MUTATION)/tree/tests
	test -d $(MUTATION)/venv || $(PYTHON) -m venv $(MUTATION)/venv
	$(MUTATION)/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		torch numpy pytest hypothesis mutmut==3.8.1
	touch $(MUTATION)/tree/rlhf_ppo/__init__.py && cp -r rlhf_ppo/core $(MUTATION)/tree/rlhf_ppo/
	cp tests/conftest.py tests/helpers.py $(MUTATION)/tree/tests/ && cp -r tests/core $(MUTATION)/tree/tests/
	cp tests/core/mutmut.toml $(MUTATION)/tree/pyproject.toml
	@# mutmut skips decorated functions, so decorate them after their definition.
	sed -i '/^@torch.no_grad()$$/d' $(MUTATION)/tree/rlhf_ppo/core/diagnostics.py
	printf '\n\nppo_diagnostics = torch.no_grad()(ppo_diagnostics)\n' >> $(MUTATION)/tree/rlhf_ppo/core/diagnostics.py
	sed -i '/^    @once_differentiable$$/d' $(MUTATION)/tree/rlhf_ppo/core/kernels/linear_logprobs.py
	printf '\n\n_LinearLogprobs.backward = staticmethod(once_differentiable(_LinearLogprobs.backward))\n' \
		>> $(MUTATION)/tree/rlhf_ppo/core/kernels/linear_logprobs.py
	sed -i '/^    @once_differentiable$$/d' $(MUTATION)/tree/rlhf_ppo/core/kernels/linear_kl.py
	printf '\n\n_LinearKL.backward = staticmethod(once_differentiable(_LinearKL.backward))\n' \
		>> $(MUTATION)/tree/rlhf_ppo/core/kernels/linear_kl.py
	cd $(MUTATION)/tree && PATH=$(CURDIR)/$(MUTATION)/venv/bin:$$PATH $(MUTATION_ENV) mutmut run --max-children 1
	cd $(MUTATION)/tree && $(CURDIR)/$(MUTATION)/venv/bin/mutmut results

clean: ## Remove the environment and caches
	rm -rf $(VENV) build .pytest_cache .ruff_cache .hypothesis *.egg-info
