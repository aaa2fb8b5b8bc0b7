# Each target first installs what it needs into .venv, on top of what is there: `make demo` the package and MiniLM,
# `photos`, `test`, `lint`, `types` and `docs` the extra of that name. Nothing else is needed but Python ≥ 3.10.
PYTHON ?= python3
# What pip installs first into a new .venv: a build of torch and torchvision of your own (CONTRIBUTING.md).
TORCH ?=
VENV := .venv
FLOORS := .venv-floors
export OMP_WAIT_POLICY ?= passive

.NOTPARALLEL:
.PHONY: demo photos tools test test-slow test-floors soak conformance lint types docs check clean

demo: $(VENV)/.minilm  ## describe every unit of the built-in world's networks, and write the report
	$(VENV)/bin/python -m jobs.demo

# A folder of photographs: make photos PHOTOS=~/pictures
PHOTOS ?=
photos: $(VENV)/.photos  ## a real network over photographs of your own: what its units respond to, scored, and the report
	@test -n "$(PHOTOS)" || { echo "name a folder of photographs: make photos PHOTOS=~/pictures" >&2; exit 2; }
	$(VENV)/bin/python -m jobs.demo --photos "$(PHOTOS)"

test: $(VENV)/.test  ## the test suite, two processes side by side; all but the long tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 -m 'not slow'

# What limits or measures memory runs with nothing beside it.
test-slow: $(VENV)/.test  ## the long tests: the whole demo, 50,000 images, submitted jobs, failing nodes
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 -m 'slow and not alone'
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m alone

soak: $(VENV)/.test  ## a job whose driver is killed 24 times, each time before another write, and one that loses a node every 20 seconds
	OMP_NUM_THREADS=1 MILAN_SOAK=24 $(VENV)/bin/python -m pytest -q -s tests/faults -k "driver_killed or every_20"

conformance: $(VENV)/.test  ## every family of torchvision, timm and transformers, read as its library says: half an hour
	OMP_NUM_THREADS=1 MILAN_CONFORMANCE=1 $(VENV)/bin/python -m pytest -q -m slow tests/benchmarks/test_conformance.py

# Kernels and formats, without Ray and without comparisons with the reference implementation; TESTS=tests for all.
TESTS ?= tests/exemplars tests/captioner tests/scoring tests/schema tests/annotations tests/probe tests/test_storage.py tests/test_config.py tests/report/test_report_files.py --ignore-glob='*_parity_*'
test-floors: $(FLOORS)/.test  ## these tests with the lowest versions that pyproject.toml declares, in .venv-floors
	OMP_NUM_THREADS=1 $(FLOORS)/bin/python -m pytest -q -n 2 -m 'not slow' $(TESTS)

$(FLOORS)/.test: pyproject.toml tests/lowest.py
	$(PYTHON) -m venv --clear $(FLOORS)
	$(PYTHON) tests/lowest.py > $(FLOORS)/lowest.txt
	$(FLOORS)/bin/python -m pip install --quiet --no-compile --editable '.[test]' --constraint $(FLOORS)/lowest.txt
	@touch $@

lint: $(VENV)/.lint  ## formatting and lint
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/.types  ## static types, of tests and examples too
	$(VENV)/bin/mypy

docs: $(VENV)/.docs  ## the pages in docs/ as HTML, in docs/_build
	$(VENV)/bin/sphinx-build -q -W --keep-going -b html docs docs/_build

check: lint types docs test test-slow

# A stamp is named after the extra that is installed; when pyproject.toml changes, pip installs the difference. Without
# --no-compile pip compiles the 30,000 modules of which a job imports a few thousand, which Python then does itself.
$(VENV)/.minilm $(VENV)/.photos $(VENV)/.test $(VENV)/.lint $(VENV)/.types $(VENV)/.docs: $(VENV)/.%: $(VENV)/.created pyproject.toml
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable '.[$*]'
	@touch $@

# pip looks at everything anew each time that it is called.
tools: $(VENV)/.created  ## what tests, lint, types and docs need, installed at once
	$(VENV)/bin/python -m pip install --quiet --no-compile --editable '.[test,lint,types,docs]'
	@touch $(addprefix $(VENV)/.,test lint types docs)

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"milan_ray needs Python 3.10 or newer; {sys.executable} is {v.major}.{v.minor}. Give another one: make PYTHON=/path/to/python3.x")'
	$(PYTHON) -m venv --clear $(VENV)
	$(if $(TORCH),$(VENV)/bin/python -m pip install --quiet --no-compile $(TORCH))
	@touch $@

clean:
	rm -rf $(VENV) $(FLOORS) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
