# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
# Whatever they need is made in .venv first.

PYTHON ?= python3
STUDY ?= examples/digits.yaml
BIN := .venv/bin
READY := .venv/ready
TEST_JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo up test test-slow test-long check format lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY)  ## Train a study on this machine and print the answer (STUDY=examples/mnist.yaml)
	@$(BIN)/regtune up --study $(STUDY)

up: $(READY)  ## Run database, service and workers on this machine until Ctrl-C
	@$(BIN)/regtune up

PYTEST = $(BIN)/pytest -n $(TEST_JOBS) --dist worksteal

test: $(READY)  ## Run the tests, real PostgreSQL included
	$(PYTEST) -m "not slow and not long"

test-slow: $(READY)  ## Run the tests that take up to a minute each
	$(PYTEST) -m slow

test-long: $(READY)  ## Run the tests that take minutes each, one after the other
	$(BIN)/pytest -m long

check: $(READY)  ## Formatter, linter, types, import contracts, migrations
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m migrations.check

format: $(READY)  ## Format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pins that still fit stay as they are; `make lock UPGRADE=--upgrade` takes the newest of all.
COMPILE = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-emit-find-links \
	--custom-compile-command "make lock"

lock: $(READY)  ## Renew requirements/*.txt (UPGRADE=--upgrade for the newest versions)
	$(COMPILE) $(UPGRADE) --all-extras --group dev -o requirements/all.txt
	$(COMPILE) --extra service -c requirements/all.txt -o requirements/service.txt
	$(COMPILE) --extra worker --extra s3 -c requirements/all.txt -o requirements/worker.txt

clean:  ## Remove what was built; .regtune, which holds studies, stays
	rm -rf .venv dist test-artifacts .mypy_cache .pytest_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements/all.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "regtune needs Python 3.11 or newer, but $(PYTHON) is" \
			"$$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into .venv; once, and with PyTorch's CUDA libraries some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --require-hashes -r requirements/all.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps --no-build-isolation --quiet -e .
	@touch $@
