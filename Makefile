# nsrl: make help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCUMENTED := $(VENV)/.documented

# one torch thread is the fastest setting for small policies, and keeps the tests off each other's cores
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# one process a core; work that is left over goes to the one that is done first
WORKERS ?= -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-cpus lint wheel wheel-check docs leaderboard reliability scale clean
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED)  ## fine-tune a CartPole policy without forgetting and show what it kept
	@$(BIN)/nsrl demo

test: $(INSTALLED)  ## run the tests except the slow ones
	@$(BIN)/python -m pytest -m "not slow" $(WORKERS) $(PYTEST_ARGS)

# new examples for the property tests each time, and more of them; a failure prints how to see it again
test-all: $(INSTALLED)  ## run all tests
	@HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-cpus: $(INSTALLED)  ## run the numerical tests as on other processors
	@$(BIN)/python tests/cpus.py $(WORKERS) $(PYTEST_ARGS)

lint: $(INSTALLED)  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

wheel: $(INSTALLED)  ## build the wheel into dist/
	@rm -rf build dist *.egg-info
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

wheel-check: $(INSTALLED)  ## build the wheel, install it away from the checkout and use it there
	@$(BIN)/python tests/wheel.py

# from scratch each time: what changed in docs/conf.py or in a face, an incremental build does not see
docs: $(DOCUMENTED)  ## build the documentation site into build/docs
	@rm -rf build/docs build/doctrees
	@$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

leaderboard: $(INSTALLED)  ## write docs/leaderboard.md from the results under runs/reference
	@$(BIN)/python docs/leaderboard.py

reliability: $(INSTALLED)  ## write the tables of docs/reliability.md from the results under runs/reference
	@$(BIN)/python docs/reliability.py

scale: $(INSTALLED)  ## write the tables of docs/scale.md from runs/reference/cost.json
	@$(BIN)/python docs/scale.py

clean:  ## remove caches and build output; keeps .venv and runs
	@rm -rf build dist *.egg-info MUJOCO_LOG.TXT .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find nsrl envs tests examples -type d -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and pinned: left to the other packages, pip would take the newest build and its CUDA packages
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing nsrl and its dependencies into $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,mujoco,analysis,llm]"
	@touch $@

$(DOCUMENTED): $(INSTALLED)
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	@touch $@
