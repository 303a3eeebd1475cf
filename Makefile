# make demo, make test: each sets up .venv by itself. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-quick check format bench-core clean

demo: $(VENV)/.runtime
	@$(BIN)/dsd demo

test: $(VENV)/.test
	@echo "==> the tests of kernels/ and model/, two at a time (about two minutes) ..."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/kernels tests/model
	@echo "==> all other tests (about four minutes; 'make test-quick' takes one in all) ..."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=8 --ignore=tests/kernels --ignore=tests/model

test-quick: $(VENV)/.test
	@echo "==> the quick tests ..."
	@$(BIN)/python -m pytest -q -m "not slow"

check: $(VENV)/.test
	@echo "==> lint ..." && $(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	@echo "==> types ..." && $(BIN)/mypy -p dsd.daemon -p dsd.ipc
	@echo "==> import directions and the size of the tail ..." && $(BIN)/python -m dsd.tools.check_house

format: $(VENV)/.test
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .

bench-core: $(VENV)/.runtime
	@$(BIN)/python -P -m dsd.tools.bench_core

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "dsd needs Python 3.11 or newer; say PYTHON=/path/to/python3.11"; exit 1; }
	@echo "==> making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(BIN)/python
	@echo "==> installing dsd and what it runs on (torch is the large one: a minute or more) ..."
	@$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.runtime
	@echo "==> installing what the tests need (ruff, mypy, transformers, openai, ...) ..."
	@$(BIN)/python -m pip install -q -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
