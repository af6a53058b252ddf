# Developer commands. They need Python 3.11 or newer, and create the virtual environment .venv themselves.

PYTHON ?= python3
ARGS ?=
EXAMPLES ?= 1000
REQUESTS ?= 1000
BIN := .venv/bin
PIP_QUIET := -qq --disable-pip-version-check --no-input --root-user-action=ignore
# Some systems turn off the cache of compiled modules. Tests start hundreds of processes, which would all compile again.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo test bench evaluate soak fuzz screenshots reference lint types imports check lock clean

help: ## list targets
	@echo "make TARGET [ARGS='more arguments'] [PYTHON=python3.12]"; echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

demo: .venv/.ready ## process a small generated conference
	@$(BIN)/jobledger demo $(ARGS)

test: .venv/.ready ## run the tests, two per core because most of them wait; ARGS='tests/ledger -k claim' selects
	@$(BIN)/pytest -n $$((2 * $$(nproc))) --dist worksteal $(ARGS)

bench: .venv/.ready ## run the benchmarks; ARGS='append --rounds 15'
	@$(BIN)/python -m benchmarks $(ARGS)

evaluate: .venv/.ready ## evaluate the extraction of text from real conference pages; ARGS='--trafilatura'
	@$(BIN)/python -m benchmarks.extraction $(ARGS)

soak: .venv/.ready ## run fault and rare-event tests in random order; EXAMPLES=5000 for longer
	@JOBLEDGER_SOAK=1 $(BIN)/pytest $$($(BIN)/python -m tests.support.soak) $(ARGS)
	@JOBLEDGER_EXAMPLES=$(EXAMPLES) $(BIN)/pytest tests/ledger/test_event_store_machine.py --timeout 0 $(ARGS)
	@$(BIN)/python -m benchmarks append subscribe pickup jobs submit http --events 2000 --rounds 1
	@for round in 1 2 3 4 5 6 7 8 9 10; do JOBLEDGER_SOAK=1 $(BIN)/pytest tests/faults $(ARGS) || exit 1; done

fuzz: .venv/.ready ## fuzz the HTTP API by its OpenAPI document; REQUESTS=10000 per route for longer
	@JOBLEDGER_FUZZ_REQUESTS=$(REQUESTS) $(BIN)/pytest tests/api/test_fuzz.py --timeout 0 $(ARGS)

screenshots: .venv/.ready ## write screenshots of the dashboard to docs/images
	JOBLEDGER_SCREENSHOTS=1 $(BIN)/pytest -q tests/api/dashboard/test_screenshots.py

reference: .venv/.ready ## generate client/synchronous, docs/reference/commands.md and events.md
	@$(BIN)/python -m tests.support.generated_docs
	@$(BIN)/python -m tests.support.generated_client

lint: .venv/.ready ## check style and formatting (ruff)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: .venv/.ready ## check types (mypy --strict)
	@$(BIN)/mypy

imports: .venv/.ready ## check import rules (import-linter)
	@$(BIN)/lint-imports

check: lint types imports test ## run lint, types, imports and test

# The lock is made with the oldest Python, which needs the most packages, and without mirrors and local wheels: its
# hashes must be those of PyPI.
lock: .venv/.ready ## update requirements.lock; ARGS=--upgrade for newer versions
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "The lock is made with Python 3.11: make clean, then make lock PYTHON=python3.11" >&2; exit 1; }
	@env -u PIP_FIND_LINKS -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null \
	  CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --all-extras --all-build-deps --allow-unsafe \
	  --generate-hashes --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --output-file=requirements.lock $(ARGS) pyproject.toml

clean: ## remove generated files (not data/)
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Without python3-venv, Debian cannot install pip into a new environment. The system's pip can install from outside.
.venv/.ready: requirements.lock pyproject.toml
	@py=""; for candidate in "$(PYTHON)" python3.11 python3.12 python3.13; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    py="$$candidate"; break; fi; done; \
	[ -n "$$py" ] || { echo "Jobledger needs Python 3.11 or newer, and $(PYTHON) is not:" \
	  "install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "Setting up .venv with $$("$$py" --version): takes about a minute, once"; \
	  "$$py" -m venv --clear .venv >/dev/null 2>&1 || \
	  { "$$py" -m pip --version && "$$py" -m venv --clear --without-pip .venv; } >/dev/null 2>&1 || \
	  { rm -rf .venv && "$$py" -m virtualenv --quiet .venv; } >/dev/null 2>&1 || \
	  { rm -rf .venv; echo "Cannot create a virtual environment: run apt-get install python3-venv" >&2; exit 1; }; \
	else \
	  echo "Updating .venv"; \
	fi; \
	if .venv/bin/python -m pip --version >/dev/null 2>&1; then set -- .venv/bin/python -m pip; \
	else set -- "$$py" -m pip --python .venv/bin/python; fi; \
	"$$@" install $(PIP_QUIET) --require-hashes -r requirements.lock && \
	.venv/bin/python -m pip install $(PIP_QUIET) --no-deps --no-build-isolation -e . && \
	touch .venv/.ready
