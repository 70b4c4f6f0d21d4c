# make demo: meta-train MAML on generated letters, judge it and write a page about it.   make test: style, types and the fast tests.
# make test-all: the exhaustive tests too, and the branches that the fast ones cover; fails below 90 %.   All of them set up .venv first.
# make docs: the site in build/site, with every warning an error and every link looked at.
# make bench: speed and memory beside other libraries, each in an environment of its own.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo
TRAIN ?=
EVALUATE ?=
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
TEST ?=
COVERAGE := --cov=metaoptim --cov-branch --cov-report=term:skip-covered --cov-fail-under=90

.PHONY: setup demo lint test test-all docs bench format clean

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
	$(MAKE) test TEST="$(COVERAGE)"
	$(PYTEST) -m slow

docs: .venv/docs
	rm -rf build/site build/doctrees
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --conf-dir docs/site -d build/doctrees . build/site
	$(BIN)/python docs/site/check.py build/site
	@echo "the site: build/site/index.html"

.venv/docs: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

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
