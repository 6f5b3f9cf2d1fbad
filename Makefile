# `make` alone lists what can be made. Everything runs in a virtual environment that make sets up itself.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)

# The core: floors 0 to 3, which does no network.
comma := ,
empty :=
CORE  := $(subst $(empty) $(empty),$(comma),$(addprefix atproto_session/, \
    errors.py _fork.py _urls.py _worker.py permissions.py _checks.py session.py keys.py _threads.py dpop.py \
    _flights.py locks/* stores/* _steps.py _terms.py cached_getter.py _records.py _rests.py refresh.py _driver.py \
    session_getter.py))

# These need servers, which CI has.
ON_SERVERS := atproto_session/locks/redis.py,atproto_session/locks/sql.py,atproto_session/stores/redis.py
ON_SERVERS := $(ON_SERVERS),atproto_session/stores/sql.py
OMIT       := $(if $(CI),,--omit='$(ON_SERVERS)')

.PHONY: help demo test lint docs dist lowest pythons model transcript soak deployed fuzz machines bench bench-quick \
    bench-peers bench-scale extras clean
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

docs: $(VENV)/.made  ## the documents as a site, in build/docs
	$(BIN)/sphinx-build --quiet --nitpicky --fail-on-warning --keep-going docs build/docs
	@echo "build/docs/index.html"

dist: $(VENV)/.made  ## the source distribution and the wheel, in dist, and whether they can be published
	rm -rf build/lib dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

lowest: $(VENV)/.made  ## the tests of the SDK, of httpx and of requests, with the lowest versions that setup.cfg allows
	$(BIN)/python -m tests.versions lowest

pythons: $(VENV)/.made  ## the tests with each later Python that is on this machine
	$(BIN)/python -m tests.versions pythons

model: $(VENV)/.made  ## every order of events of a refresh, with two and with three workers
	$(BIN)/python -m tests.model

transcript: $(VENV)/.made  ## what a new user sees, from pip install to the first post
	$(BIN)/python -m pytest -q -rP tests/pds/test_first_steps.py

SECONDS ?= 60
STORE   ?= sqlite
soak: $(VENV)/.made  ## faults and kills at random, over many accounts: SECONDS=600 STORE=json
	$(BIN)/python -m tests.soak --seconds $(SECONDS) --store $(STORE)

ROUNDS ?= 10
deployed: $(VENV)/.made  ## gunicorn and Celery over one store, over restarts and kills: ROUNDS=10
	ROUNDS=$(ROUNDS) $(BIN)/python -m pytest -o timeout=0 tests/topics/test_deployments.py

fuzz: $(VENV)/.made  ## hostile input to everything that parses
	$(BIN)/python -m tests.fuzz

machines: $(VENV)/.made  ## several machines share Redis, PostgreSQL and MariaDB: cuts, pauses, restarts (root, and Debian's servers)
	$(BIN)/python -m tests.machines

bench: $(VENV)/.made  ## what requests, refreshes and starts cost, against the least that they can cost
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m tests.bench --docs docs

bench-quick: $(VENV)/.made  ## the same in short: fails where a figure is worse than its limit
	$(BIN)/python -m tests.bench --quick

PEERS := $(VENV)-peers
bench-peers: $(VENV)/.made  ## what other libraries do with one expired session, beside this one
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --editable . -r tests/peers.txt
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m tests.bench_peers --python $(PEERS)/bin/python --docs docs

extras: $(VENV)/.made  ## install each extra alone, and use it
	$(BIN)/python -m tests.extras

bench-scale: $(VENV)/.made  ## how each store grows to a million accounts, many that expire at once, killed workers
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m tests.bench_scale --docs docs

clean:  ## remove what was made
	rm -rf $(VENV) $(PEERS) .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
