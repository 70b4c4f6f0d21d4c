# make demo: meta-train MAML on generated letters, judge it and write a page about it.   make test: style, types and the fast tests.
# make test-all: the exhaustive tests too, with the branches that all cover; fails below 90 %.   All of them set up .venv first.
# make bench: speed and memory beside other libraries, each in an environment of its own.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo
TRAIN ?=
EVALUATE ?=
PYTEST := $(BIN)/python -m pytest -n auto
TEST ?=
COVERAGE := --cov=metaoptim --cov-branch

.PHONY: setup demo lint test test-all bench format clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready
	rm -rf $(DEMO)
	$(BIN)/metaoptim train glyphs-maml --out $(DEMO) $(TRAIN)
	$(BIN)/metaoptim evaluate $(DEMO) $(EVALUATE)
	$(BIN)/metaoptim report $(DEMO)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) -m "not slow" $(TEST)

test-all:
	$(MAKE) test TEST="$(COVERAGE) --cov-report="
	$(PYTEST) -m slow $(COVERAGE) --cov-append --cov-report=term:skip-covered --cov-fail-under=90

bench: .venv-bench/ready .venv-jax/ready
	.venv-bench/bin/python benchmarks/speed.py
	.venv-bench/bin/python benchmarks/memory.py

.venv-bench/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --editable . higher torchopt
	touch $@

.venv-jax/ready:
	$(PYTHON) -m venv .venv-jax
	.venv-jax/bin/python -m pip install --quiet "jax[cpu]" optax
	touch $@

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-bench .venv-jax build dist .mypy_cache .ruff_cache .pytest_cache
