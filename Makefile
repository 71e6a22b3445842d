# Every target sets up .venv by itself. TORCH: which torch to install first (a CPU build keeps the download small).
PYTHON ?= python3.11
TORCH  ?= torch==2.13.0
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Three test files at a time, the long ones first: on two cores, as much of them is waiting (tests/README.md).
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS := 1
export PYTHONUNBUFFERED := 1

.PHONY: help install demo test bench chaos lint types docs clean
help:
	@echo "make demo    train MODIP on HalfCheetah with local Ray, about 10 minutes on 2 cores, into runs/demo (run it again to resume)"
	@echo "make test    unit, property and end-to-end tests"
	@echo "make bench   timings of planner, learner, replay, environments, weights; serial against Ray"
	@echo "make chaos   kill, freeze, fill and damage runs and check that nothing is lost, into results/chaos.json (make chaos FAST=1: under 5 minutes)"
	@echo "make lint    ruff, and make types"
	@echo "make types   mypy on the public interfaces"
	@echo "make docs    the documentation, into site/index.html"
	@echo "make install only set up .venv"

install: $(STAMP)
$(STAMP): requirements.txt pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(STAMP)

demo: install
	$(BIN)/python -m modip_ray train --config demo run_dir=runs/demo

test: install
	$(BIN)/python -m pytest -q $(PARALLEL)

bench: install
	$(BIN)/python -m modip_ray bench all --json results/bench/$$(date +%F).json

chaos: install
	$(BIN)/python -m tests.chaos $(if $(FAST),--fast,--json results/chaos.json) $(if $(ONLY),--only $(ONLY))

lint: install types
	$(BIN)/python -m ruff check modip_ray tests scripts cluster examples

types: install
	$(BIN)/python -m mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache site
