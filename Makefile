# `make demo` and `make test` are all one needs to begin with; `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
SOURCES := operator tests dev

.DEFAULT_GOAL := help

include $(addprefix dev/mk/,cluster.mk images.mk demo.mk proof.mk)

.PHONY: help test lint format types test-unit test-api test-e2e test-docs test-static test-ground clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST) | sort

# Side by side where one of two waits for what the other does not need. test-e2e deploys an operator that acts on all
# namespaces, so what starts operators of its own comes after it.
test: deps ## All tests: lint, types, unit, e2e, api, races
	@$(MAKE) -j2 test-static test-ground
	@$(MAKE) -j2 --output-sync=target test-unit test-e2e
	@$(MAKE) test-docs
	@$(MAKE) test-api test-race

test-static:
	@$(MAKE) lint
	@$(MAKE) types

test-ground:
	@$(MAKE) cluster-up NODES=$(or $(NODES),both)
	@$(MAKE) images

# What the lock file says, by hash. The project itself is run from the checkout.
$(VENV)/.installed: requirements/dev.lock
	@python3 -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.lock
	@$(BIN)/python -c 'import pathlib, sys, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "ingestrun.pth").write_text(sys.argv[1] + "\n")' "$(CURDIR)/operator"
	@touch $@

lint: $(VENV)/.installed ## Style, lint, and who imports whom
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@PYTHONPATH=operator $(BIN)/lint-imports --no-cache

format: $(VENV)/.installed ## Put the style right
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

types: $(VENV)/.installed ## mypy, strict
	@$(BIN)/mypy $(SOURCES)

test-unit: $(VENV)/.installed ## Tests that need no cluster
	@$(BIN)/pytest -q -n auto tests/unit

test-api: $(VENV)/.installed ## Tests against a real API server and simulated nodes
	@eval "$$($(DEVCLUSTER) env)" && $(BIN)/pytest -q -n 4 --dist load --maxschedchunk 1 tests/api

test-e2e: $(VENV)/.installed ## Tests of the deployed operator and the real images
	@eval "$$($(DEVCLUSTER) env)" && set -a && . build/images.env && set +a && $(BIN)/pytest tests/e2e

test-docs: $(VENV)/.installed ## What README and docs show, applied and run, and the output compared
	@eval "$$($(DEVCLUSTER) env)" && set -a && . build/images.env && set +a && $(BIN)/pytest tests/docs

clean: ## Remove what was built here; the caches and the cluster stay
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)
