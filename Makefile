# `make demo` and `make test` work on a machine that has only python3 (3.11 or newer), its venv module and make.
PYTHON ?= python3
VENV ?= .venv
# Extras of pyproject.toml; tests of what an absent one would bring are skipped with the reason.
EXTRAS ?= dev
STAMP := $(VENV)/.installed-$(EXTRAS)
BIN := $(VENV)/bin
# Huge pages for large host buffers; glibc reads this only when a process starts.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test test-slow lint install clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@echo "Installing Halfmoon into $(VENV) (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check -e '.[$(EXTRAS)]'
	@touch $@

demo: install
	$(BIN)/python -m experiments.demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) .jax_cache out
