# One environment, .venv, that grows: what serving needs (no torch), then training and development,
# then the libraries the benchmarks run beside.  A stamp in it says how far it has come, and a change of
# pyproject.toml or constraints.txt makes it old.

VENV ?= .venv
ARGS ?=
PIP = $(VENV)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test coverage lint format models bench deploy-lint deploy-check install install-dev install-deploy install-bench clean

help:  ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '%-22s%s\n' "$$target" "$$text"; done

serve: install  ## Serve the bundled models on 127.0.0.1:8000 (ARGS="--port 8001" for another port)
	$(VENV)/bin/pushforward serve $(ARGS)

# Three processes, also on two cores: they wait for servers half of the time.
test: install-dev  ## Run every test and doctest in three processes (ARGS="-k name" for some of them)
	$(VENV)/bin/python -m pytest --numprocesses 3 --dist loadfile $(ARGS)

coverage: install-dev  ## Run the tests, more slowly, and say which lines none of them reached
	$(VENV)/bin/python -m pytest --cov --numprocesses 3 --dist loadfile $(ARGS)

lint: install-dev  ## Check style, types and the direction of imports
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: install-dev  ## Rewrite the files in the project's style
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

models: install-dev  ## Train the bundled models again, into model_store
	$(VENV)/bin/python -m pushforward.training.bundled $(ARGS)

bench: install-bench  ## Measure the speed beside other libraries
	$(VENV)/bin/python benchmarks $(ARGS)

deploy-lint: install-deploy  ## Check the images' recipe, Compose file, alert rules and manifests, without running them
	deploy/lint $(VENV)/bin

deploy-check: install  ## Build and start everything with Docker Compose, break it in every way, and take it down
	$(VENV)/bin/python deploy/drills.py $(ARGS)

install: $(VENV)/.serving  ## Set up .venv for serving (no torch)

install-dev: $(VENV)/.development  ## Add training and development to .venv

install-deploy: $(VENV)/.deployment  ## Add what deploy-lint runs to .venv

install-bench: $(VENV)/.benchmarks  ## Add the libraries the benchmarks run beside

clean:  ## Remove .venv and every cache
	rm -rf .venv .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist

$(VENV)/.created:
	@for python in python3.11 python3 python3.12 python3.13; do \
		if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			$$python -m venv $(VENV) && touch $@; exit; fi; done; \
		echo 'Python 3.11 or newer is needed, with its venv module (on Debian: python3-venv).' >&2; exit 1

$(VENV)/.serving: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) --editable '.[tables]'
	touch $@

$(VENV)/.development: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) --editable '.[tables,train,dev]'
	touch $(VENV)/.serving $@

$(VENV)/.deployment: pyproject.toml constraints.txt | $(VENV)/.created
	$(PIP) --editable '.[deploy]'
	touch $@

$(VENV)/.benchmarks: benchmarks/requirements.txt | $(VENV)/.development
	$(PIP) --requirement benchmarks/requirements.txt
	touch $@
