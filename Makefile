# make demo: handwritten digits, a small ResNet, and ELLA at the end.   make test: lint, types and tests.   make docs: the site.
# make clients: projects of others, with the callback.   make gpu: the tests and the figures of a GPU, in ten minutes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test docs clients gpu
demo: .venv/recipes
	$(BIN)/python recipes/train.py

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: .venv/dev
	$(BIN)/mkdocs build

gpu: .venv/dev
	$(BIN)/pytest tests/test_cuda.py
	$(BIN)/python recipes/gpu.py

clients: .venv/recipes
	$(BIN)/python recipes/clients.py $(only)

.venv/recipes: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[recipes]"
	touch $@

.venv/dev: .venv/recipes
	$(BIN)/pip install --quiet --group dev
	touch $@
