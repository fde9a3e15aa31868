# make demo: handwritten digits, a small ResNet, and ELLA at the end.   make test: lint, types and tests.   make docs: the site.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs
demo: .venv/recipes
	$(BIN)/python recipes/train.py

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -n 2 --dist loadfile

docs: .venv/dev
	$(BIN)/mkdocs build

.venv/recipes: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[recipes]"
	touch $@

.venv/dev: .venv/recipes
	$(BIN)/pip install --quiet --group dev
	touch $@
