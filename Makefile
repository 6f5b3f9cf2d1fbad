# `make` alone lists what can be made. Everything runs in a virtual environment that make sets up itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# The core: floors 0 to 3, which does no network.
comma := ,
empty :=
CORE  := $(subst $(empty) $(empty),$(comma),$(addprefix atproto_session/, \
    errors.py _fork.py _urls.py _worker.py session.py keys.py _threads.py dpop.py _flights.py locks/* stores/* \
    _steps.py _terms.py cached_getter.py _records.py _rests.py refresh.py _driver.py session_getter.py))

# These need servers, which CI has.
ON_SERVERS := atproto_session/locks/redis.py,atproto_session/locks/sql.py,atproto_session/stores/redis.py
ON_SERVERS := $(ON_SERVERS),atproto_session/stores/sql.py
OMIT       := $(if $(CI),,--omit='$(ON_SERVERS)')

.PHONY: help demo test lint model soak fuzz machines bench bench-scale clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(VENV)/.made: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[cli,test,lint]'
	@touch $@

demo: $(VENV)/.made  ## many processes and threads share one account for half a minute
	$(BIN)/python -m atproto_session demo

# More than two cores are, since many tests wait.
WORKERS ?= 3
test: $(VENV)/.made  ## run the tests, side by side in WORKERS=3 processes (with a real PDS where npm is there)
	-@$(BIN)/python -m tests.pds.install >/dev/null  # now, and not in every worker
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(WORKERS)
	$(BIN)/coverage combine --quiet
	@rm -f .coverage.*  # what processes that were killed have left half-written
	$(BIN)/coverage report --fail-under=95 $(OMIT)
	$(BIN)/coverage report --fail-under=100 --include='$(CORE)' $(OMIT)

lint: $(VENV)/.made  ## mypy --strict and ruff
	$(BIN)/mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check

model: $(VENV)/.made  ## every order of events of a refresh, with two and with three workers
	$(BIN)/python -m tests.model

SECONDS ?= 60
STORE   ?= sqlite
soak: $(VENV)/.made  ## faults and kills at random, over many accounts: SECONDS=600 STORE=json
	$(BIN)/python -m tests.soak --seconds $(SECONDS) --store $(STORE)

fuzz: $(VENV)/.made  ## hostile input to everything that parses
	$(BIN)/python -m tests.fuzz

machines: $(VENV)/.made  ## several machines share Redis and PostgreSQL: cuts, pauses, restarts (root, and Debian's servers)
	$(BIN)/python -m tests.machines

bench: $(VENV)/.made  ## what a request costs, against a bare one
	$(BIN)/python tests/bench.py

bench-scale: $(VENV)/.made  ## what a read costs among a thousand and among a million accounts, in each store
	$(BIN)/python tests/bench_scale.py

clean:  ## remove what was made
	rm -rf $(VENV) .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
