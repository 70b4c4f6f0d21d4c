# make demo: meta-train MAML on generated letters and judge it.   make test: every check.   Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= runs/demo
TRAIN ?=
EVALUATE ?=

.PHONY: setup demo test format clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready
	rm -rf $(DEMO)
	$(BIN)/metaoptim train glyphs-maml --out $(DEMO) $(TRAIN)
	$(BIN)/metaoptim evaluate $(DEMO) $(EVALUATE)

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
