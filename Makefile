# `make` lists the targets. PYTHON names the Python that a new .venv is made from.
PYTHON ?= python3
VENV := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint typecheck pytest faults bench check format docs clean distclean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

setup: ## create .venv, or use the active environment; the other targets do this by themselves
	@PYTHON="$(PYTHON)" scripts/setup_env.sh

quickstart: setup ## train, kill and resume on 2 ranks, and compare with a run that was never killed
	@$(VENV) scripts/quickstart.py $(ARGS)

# One after the other and the fast ones first, whatever -j says: the last line is pytest's.
test: setup ## lint, type check and all tests; .ci/run calls this
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory typecheck
	@$(MAKE) --no-print-directory pytest

lint: setup ## ruff check, ruff format --check
	@$(VENV) -m ruff check .
	@$(VENV) -m ruff format --check .

typecheck: setup ## mypy, strict, over bridge/
	@$(VENV) -m mypy

# Two workers, each with whole files: tests wait for processes more than they compute.
pytest: setup ## the tests alone; ARGS='-k name' passes arguments to pytest
	@$(VENV) -m pytest -n 2 --dist loadfile $(ARGS)

faults: setup ## the whole fault-injection suite (docs/faults.md); takes half an hour or more on 2 cores
	@$(VENV) -m pytest tests/faults -m 'faults or not slow' -n 2 --dist worksteal $(ARGS)

bench: setup ## all benchmarks, and docs/benchmarks.md of them (twenty minutes); ARGS=--small tries them out
	@$(VENV) -W ignore -m scripts.benchmarks.all $(ARGS)

check: test ## the same as test

format: setup ## ruff format and the safe fixes of ruff check, in place
	@$(VENV) -m ruff format .
	@$(VENV) -m ruff check --fix .

docs: setup ## the documentation as a site in build/docs; ARGS=--serve shows it while it is written
	@NO_MKDOCS_2_WARNING=1 $(VENV) -m mkdocs $(if $(findstring --serve,$(ARGS)),serve,build --strict)

clean: ## delete caches and the runs of quickstart; keeps .venv and data/
	rm -rf runs/quickstart build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## clean, and delete .venv and the prepared data
	rm -rf .venv data/quickstart bridge.egg-info
