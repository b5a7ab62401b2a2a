# `make` lists what there is. The environment is made once and again when what it depends on changes.

PYTHON ?= python3.11
VENV ?= .venv
EXTRA ?= cpu#   cpu, or gpu for machines with CUDA
DEV ?= ,dev#    tools for tests and checks; an image is built without
ARGS ?=#        passed on to pytest

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test coverage chaos check smoke bench clean

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Modules are compiled when they are first imported: most of what is installed never is. Where writing bytecode is
# switched off, every one of a run's many processes would compile them again.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PIP) install --quiet --no-compile
READY := $(VENV)/.ready-$(strip $(EXTRA))
TORCH := $(shell sed -n 's/^ *"\(torch==[0-9.]*\)",$$/\1/p' pyproject.toml)

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(READY) ## make .venv and install everything into it (EXTRA=gpu takes the CUDA builds)

demo: setup ## run the whole pipeline on the synthetic shop and print its metrics
	$(BIN)/pulse-ray run configs/quickstart.yaml

test: setup ## run the tests (ARGS="-k config" passes arguments to pytest)
	$(BIN)/python -m pytest $(ARGS)

# Ray's workers, Serve's replicas and every command that a test starts are measured too: coverage's `subprocess` patch
# reaches each Python process, and COVERAGE_FILE names one place for their data whatever their working folder is.
coverage: export COVERAGE_FILE := $(CURDIR)/.coverage/data
coverage: export PYTHONPATH := $(CURDIR)/.ci
coverage: setup ## run the tests, report line and branch coverage, and uncovered lines without a reason
	@rm -rf .coverage && mkdir -p .coverage
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet || echo "The coverage of a process that was killed while it saved is left out" >&2
	$(BIN)/coverage json --quiet -o .coverage/coverage.json
	$(BIN)/coverage report --skip-covered --show-missing
	$(BIN)/python .ci/uncovered.py .coverage/coverage.json docs/uncovered.md

chaos: setup ## kill drivers, engines and nodes at random while trees grow: a quarter of an hour
	$(BIN)/python -m pytest -m chaos tests/generation/test_chaos.py $(ARGS)

check: setup ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

smoke: setup ## run every benchmark at its smallest sizes: each path, no figures
	@failed=0; for file in benchmarks/[!_]*.py; do \
	  name=$$(basename $$file .py); started=$$SECONDS; \
	  if $(BIN)/python -m benchmarks.$$name --smoke > .smoke.out 2> .smoke.log && \
	    tail -n 1 .smoke.out | $(BIN)/python -c 'import json, sys; json.load(sys.stdin)["figures"]'; \
	  then echo "benchmarks.$$name --smoke: passed in $$((SECONDS - started)) s"; \
	  else failed=1; tail -n 40 .smoke.log; echo "benchmarks.$$name --smoke: failed"; fi; \
	done; rm -f .smoke.out .smoke.log; exit $$failed

bench: setup ## run every benchmark and keep its last line in benchmarks/results/
	@mkdir -p benchmarks/results; failed=0; shopt -s nullglob; \
	for file in benchmarks/[!_]*.py; do \
	  name=$$(basename $$file .py); \
	  $(BIN)/python -m benchmarks.$$name | tee /dev/stderr | tail -n 1 > benchmarks/results/$$name.json || failed=1; \
	done; exit $$failed

clean: ## remove caches and build folders; the environment, downloads and runs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# constraints.txt pins what the CPU set was tested with, and spares pip the search. Torch comes from the configured
# indexes where they have its CPU build, else from PyTorch's own. vLLM brings torchvision, torchaudio and torchcodec in
# builds that do not match a CPU torch, and transformers would stumble over them.
$(VENV)/.ready-cpu: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here; name one with make PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the CPU set into $(VENV): some minutes, about 4 GB"
	$(INSTALL) "$(TORCH)+cpu" 2>/dev/null || $(INSTALL) --index-url https://download.pytorch.org/whl/cpu "$(TORCH)+cpu"
	$(INSTALL) --constraint constraints.txt --editable ".[cpu$(strip $(DEV))]"
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	rm -f $(VENV)/.ready-gpu
	touch $@

$(VENV)/.ready-gpu: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here; name one with make PYTHON=…" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the GPU set into $(VENV)"
	$(INSTALL) --editable ".[gpu$(strip $(DEV))]"
	rm -f $(VENV)/.ready-cpu
	touch $@
