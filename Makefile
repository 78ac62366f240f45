# Everything a fresh machine needs: Python 3.11+, git and make.
#   make demo    set up, then transfer circuits in the shipped models and write report/index.html
#   make test    set up, then lint, check types and run all tests
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python -m

.PHONY: demo test lint types fix clean

# Set up once; again when a file that says what to install has changed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(VENV)/bin/dfa-lens demo $(ARGS)

test: $(VENV)/.installed lint types
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto $(ARGS)

lint: $(VENV)/.installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.installed
	$(RUN) mypy

fix: $(VENV)/.installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:
	rm -rf $(VENV) report .pytest_cache .mypy_cache .ruff_cache
