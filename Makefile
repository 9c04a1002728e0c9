# make demo   install, start a server on a small model, send it 16 chats at once, print what it says
# make serve  leave such a server up at http://127.0.0.1:8000
# make test   everything a change must pass: ruff, mypy, pytest
# make lint   ruff and mypy alone
# make docs   docs/api.md, from the table of request fields

PYTHON ?= python3
MODEL ?= smollm2
PORT ?= 8000
BIN := .venv/bin

# Tests that start servers.
WHOLE_MACHINE := tests/e2e tests/guide tests/server tests/engine tests/examples

# Stamps: nothing is installed again until pyproject.toml changes.
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev

.PHONY: demo serve test lint docs clean

demo: $(INSTALLED)
	$(BIN)/octavo pull smollm2
	$(BIN)/python examples/demo.py

serve: $(INSTALLED)
	$(BIN)/octavo serve $(MODEL) --port $(PORT)

# Two at a time, then those that start servers, which want every core.
test: lint
	$(BIN)/octavo pull smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(addprefix --ignore=,$(WHOLE_MACHINE))
	$(BIN)/python -m pytest $(WHOLE_MACHINE)

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m octavo.server.api_page > docs/api.md

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv .venv

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(INSTALLED)
