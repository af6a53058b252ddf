# Everything a developer runs. `make demo` and `make test` need Python 3.11 or newer and set up the rest themselves in .venv.

PYTHON ?= python3
ARGS ?=
STORIES ?= 1000
REQUESTS ?= 1000
BIN := .venv/bin
PIP_QUIET := -qq --disable-pip-version-check --no-input --root-user-action=ignore

.DEFAULT_GOAL := help
.PHONY: help demo test bench soak fuzz images reference lint types contracts check lock clean

help: ## list these targets
	@echo "make TARGET [ARGS='more arguments'] [PYTHON=python3.12]"; echo
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

demo: .venv/.ready ## a small conference, from submitted sessions to finished Markdown
	@$(BIN)/jobledger demo $(ARGS)

test: .venv/.ready ## the tests, two at a time; ARGS='tests/ledger -k claim' for some of them, ARGS='-n 8' if you have the cores
	@$(BIN)/pytest -n 2 $(ARGS)

bench: .venv/.ready ## what is claimed about speed, against the plain driver; ARGS='append --rounds 15'
	@$(BIN)/python -m benchmarks $(ARGS)

soak: .venv/.ready ## the tests of docs/fault-matrix.md and of rare things, in random order; STORIES=5000 for longer
	@JOBLEDGER_SOAK=1 $(BIN)/pytest $$($(BIN)/python -m tests.support.soak) $(ARGS)
	@JOBLEDGER_STORIES=$(STORIES) $(BIN)/pytest tests/ledger/test_log_machine.py --timeout 0 $(ARGS)
	@$(BIN)/python -m benchmarks append subscribe jobs http --events 2000 --rounds 1
	@for round in 1 2 3 4 5 6 7 8 9 10; do JOBLEDGER_SOAK=1 $(BIN)/pytest tests/faults $(ARGS) || exit 1; done

fuzz: .venv/.ready ## the HTTP interface, by its own OpenAPI document; REQUESTS=10000 of each route for longer
	@JOBLEDGER_FUZZ=$(REQUESTS) $(BIN)/pytest tests/api/test_fuzz.py --timeout 0 $(ARGS)

images: .venv/.ready ## the dashboard's pages as pictures, into docs/images
	JOBLEDGER_IMAGES=1 $(BIN)/pytest -q tests/api/dashboard/test_images.py

reference: .venv/.ready ## docs/commands.md and docs/events.md, from the commands and the events themselves
	@$(BIN)/python -m tests.support.references

lint: .venv/.ready ## style and formatting (ruff)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: .venv/.ready ## static types (mypy --strict)
	@$(BIN)/mypy

contracts: .venv/.ready ## who may import whom (import-linter)
	@$(BIN)/lint-imports

check: lint types contracts test ## all of the above but the demo

# The oldest Python decides, because it needs the most packages. Mirrors and local wheels are left out of it: the hashes
# in the lock must be those of PyPI.
lock: .venv/.ready ## pin pyproject.toml's dependencies again; ARGS=--upgrade for newer ones
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "The lock is made with Python 3.11: make clean, then make lock PYTHON=python3.11" >&2; exit 1; }
	@env -u PIP_FIND_LINKS -u PIP_INDEX_URL -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null \
	  CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --all-extras --all-build-deps --allow-unsafe \
	  --generate-hashes --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --output-file=requirements.lock $(ARGS) pyproject.toml

clean: ## remove what can be made again (not data/)
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian without python3-venv cannot put pip into a new environment; the machine's own pip can fill it from outside.
.venv/.ready: requirements.lock pyproject.toml
	@py=""; for candidate in "$(PYTHON)" python3.11 python3.12 python3.13; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    py="$$candidate"; break; fi; done; \
	[ -n "$$py" ] || { echo "Jobledger needs Python 3.11 or newer, and $(PYTHON) is not:" \
	  "install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "Setting up .venv with $$("$$py" --version): about a minute, only this once"; \
	  "$$py" -m venv --clear .venv >/dev/null 2>&1 || \
	  { "$$py" -m pip --version && "$$py" -m venv --clear --without-pip .venv; } >/dev/null 2>&1 || \
	  { rm -rf .venv && "$$py" -m virtualenv --quiet .venv; } >/dev/null 2>&1 || \
	  { rm -rf .venv; echo "No virtual environment can be made here: apt-get install python3-venv" >&2; exit 1; }; \
	else \
	  echo "Bringing .venv up to date"; \
	fi; \
	if .venv/bin/python -m pip --version >/dev/null 2>&1; then set -- .venv/bin/python -m pip; \
	else set -- "$$py" -m pip --python .venv/bin/python; fi; \
	"$$@" install $(PIP_QUIET) --require-hashes -r requirements.lock && \
	.venv/bin/python -m pip install $(PIP_QUIET) --no-deps --no-build-isolation -e . && \
	touch .venv/.ready
