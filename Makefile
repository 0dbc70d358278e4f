# make demo    train two small models, eager and under Kitsune, and compare
# make test    lint and types where the tools are there, then the tests
# make test-full  every sample of torch's databases of operators, modules and optimizers, some 100,000; SHARD=2/4 runs the second
#                 of four shards, and `python -m tests.parity.sweep --merge sweep-*.jsonl` adds up what they wrote; and 2,000
#                 training programs that are put together from parts (tests/steady/mixed.py), MIXED="--runs 100" fewer
# make schedules  the plans of 10,000 random graphs on several streams, and of each with one wait after the other left out
# make mutants    320 small mistakes in the planner and in what renders kernels: does a test find each? an hour or two on one core
# make coverage   which lines of Kitsune the tests run, on one core
# make crossref   what is predicted of every operator's results, its tensors in four other layouts; SHARD=1/4 as above
# make memory-check  every address that kernels of all rules touch in the interpreter
# make figures    what all of these have found, anchor by anchor, in one table, beside how many are asked for
# make chaos   what users do besides training in a straight line, and what may befall a process, at length: tests/chaos, and 2,000
#              scripts of 2,000 lines in two worlds; SHARD=2/8 runs every eighth of them, MACHINE="--runs 100" fewer
# make lint    ruff and mypy alone
# make setup   .venv with all that the above need (each of them does it first)
#
# SETUP=0      skip set-up: use the ambient python and whatever it has (it must have torch)
# PYTHON=...   the python to make .venv from, or with SETUP=0 the one to run
# TORCH=...    what to install when .venv has no torch; the default index has the CPU build under this pin for some
#              platforms and a CUDA build for others
# TRITON=...   the same for Triton, whose interpreter and compiler the tests of kernels use (Linux only); CPU builds of torch
#              come without one

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
SETUP ?= 1
VENV := .venv

ifeq ($(SETUP),0)
  READY :=
  RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
else
  READY := $(VENV)/.ready
  RUN := $(VENV)/bin/python
endif

# $(call has,module): is it importable by the python that runs?
has = $(RUN) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("$(1)") is None)'

.PHONY: demo test test-full chaos schedules mutants coverage crossref memory-check figures lint setup clean

demo: $(READY)
	@$(RUN) -m kitsune demo

test: lint
	@flags=""; \
	if $(call has,xdist); then flags="$$flags -n auto --dist worksteal"; fi; \
	if $(call has,pytest_timeout); then flags="$$flags --timeout 60"; fi; \
	$(RUN) -m pytest tests -q $$flags $(ARGS)

SHARD ?= 1/1
test-full: $(READY)
	@OMP_NUM_THREADS=1 $(RUN) -m tests.parity.sweep --shard $(SHARD) --out sweep-$(subst /,-of-,$(SHARD)).jsonl $(ARGS)
	@OMP_NUM_THREADS=1 $(RUN) -W ignore -m tests.steady.mixed --shard $(SHARD) --out mixed-$(subst /,-of-,$(SHARD)).jsonl $(MIXED)

schedules: $(READY)
	@OMP_NUM_THREADS=1 $(RUN) -W ignore -m tests.property.schedules --graphs 10000 --out schedules.jsonl $(ARGS)

mutants: $(READY)
	@$(RUN) -W ignore -m tests.mutants.run $(ARGS)

coverage: $(READY)
	@OMP_NUM_THREADS=1 $(RUN) -m coverage run --source kitsune -m pytest tests -q -p no:xdist --deselect tests/benchmarks $(ARGS)
	@$(RUN) -m coverage json -q -o coverage.json

crossref: $(READY)
	@OMP_NUM_THREADS=1 $(RUN) -W ignore -m tests.crossref --shard $(SHARD) --out crossref-variants-$(subst /,-of-,$(SHARD)).jsonl $(ARGS)

memory-check: $(READY)
	@folder=$$(mktemp -d) && OMP_NUM_THREADS=1 $(RUN) -W ignore -m tests.codegen.memory_check "$$folder" $(ARGS); \
	status=$$?; rm -rf "$$folder"; exit $$status

figures: $(READY)
	@$(RUN) -m tests.figures $(ARGS)

chaos: $(READY)
	@mkdir -p results
	@CHAOS=full OMP_NUM_THREADS=1 $(RUN) -m pytest tests/chaos -q --junitxml=results/tests-of-chaos.xml $(ARGS)
	@OMP_NUM_THREADS=1 $(RUN) -m tests.property.machine --shard $(SHARD) --out machine-$(subst /,-of-,$(SHARD)).jsonl $(MACHINE)

lint: $(READY)
	@if $(call has,ruff); then $(RUN) -m ruff check .; else echo "ruff is not installed: skipped"; fi
	@if $(call has,mypy); then $(RUN) -m mypy; else echo "mypy is not installed: skipped"; fi

setup: $(READY)
	@echo "ready: $(RUN)"

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Kitsune needs Python 3.10 or later; name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian: apt install python3-venv)" \
	       "or use the packages that are there with SETUP=0" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@# torch first and only if missing: a plain "torch" would pull gigabytes of CUDA libraries
	@$(VENV)/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
	  || $(VENV)/bin/python -m pip install -q "$(TORCH)"
	@$(VENV)/bin/python -m pip install -q -e '.[demo,report,dev]'
	@$(VENV)/bin/python -c 'import importlib.util, sys; sys.exit(sys.platform == "linux" and importlib.util.find_spec("triton") is None)' \
	  || $(VENV)/bin/python -m pip install -q "$(TRITON)" \
	  || echo "$(TRITON) cannot be installed here: the tests that need it are skipped" >&2
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
