# make demo   sets everything up and runs the main job on embedded real text
# make test   sets everything up and runs the default tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: small models on a busy machine run several times slower with more.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# Tests start many processes, which need not compile the sources anew each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-slow golden lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("thrifty needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/thrifty demo

test: setup
	$(BIN)/python -m pytest -m "not long and not slow and not gpu" -n 2 --dist loadgroup

test-slow: setup
	$(BIN)/python -m pytest -m "long or slow" -n 2 --dist loadgroup

golden: setup
	THRIFTY_RECORD=1 $(BIN)/python -m pytest -q tests/test_golden.py

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
