# `make help` lists the targets. Everything runs in .venv, which any target makes first.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Stages in dvc.yaml say `python`, and mean the one of .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PRESET ?= default
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000
# Most of the suite's time is servers and processes that start. A file's tests share what they set up, and files begin
# in their order: those with the longest tests are not among the last.
IN_PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help repro flow ui down serve chat test test-unit lint lock bench bench-data bench-parallel bench-serve check-cache clean

help: ## List the targets
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 16

repro: .venv/.installed ## Bring every stage up to date with plain DVC (PRESET=smoke: another preset)
	@python -m tasks.reproduce --preset $(PRESET)

flow: .venv/.installed ## The same as a Prefect flow, one task a stage (PRESET=...)
	@python -m flows.pipeline --preset $(PRESET)

ui: .venv/.installed ## MLflow's UI, Prefect's server, a worker and the deployments, until Ctrl-C or make down
	@exec python -m flows.ui --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

down: .venv/.installed ## End what make ui started
	@python -m flows.ui --down

serve: .venv/.installed ## Serve the champion over OpenAI's API
	@exec chatloom serve

chat: .venv/.installed ## Talk to the champion in the terminal
	@exec chatloom chat

test: lint ## Everything: linters, types, import rules, every test (GPU tests skip themselves without CUDA)
	pytest $(IN_PARALLEL)

test-unit: .venv/.installed ## Tests that need no server and no pipeline run
	pytest $(IN_PARALLEL) -m "not smoke"

lint: .venv/.installed ## Linters, types, import rules
	ruff check
	ruff format --check
	mypy
	lint-imports

lock: ## Resolve requirements.lock anew from pyproject.toml, with uv in a throwaway environment
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT \
	&& "$(PYTHON)" -m venv "$$folder" && "$$folder/bin/pip" install --quiet uv \
	&& "$$folder/bin/uv" pip compile --python-version 3.11 --override requirements-overrides.txt --extra colossalai --extra team --extra dev \
		--generate-hashes --no-emit-index-url --no-header --no-annotate -o requirements.lock pyproject.toml

bench: .venv/.installed ## Measure speed and memory against the peers (PART=sft: only the parts that begin so)
	@python -m bench $(if $(PART),--part $(PART))

bench-data: .venv/.installed ## Measure data preparation against datasets.map (ROWS=file of Alpaca rows)
	@python -m bench.data --rows "$(or $(ROWS),$(CHATLOOM_DATA)/instructions_104k.jsonl.gz)"

bench-parallel: .venv/.installed ## Measure SFT in two processes against one with two threads
	@python -m bench.parallel

bench-serve: .venv/.installed ## Measure the server under load, beside transformers serve
	@python -m bench.serve

check-cache: .venv/.installed ## Hash every object of DVC's cache again and remove those that are spoiled
	@python -m tasks.cache

clean: ## Remove caches of tools and workspaces of presets; data, models, runs and .venv stay
	rm -rf workspaces build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps are written last: what was left half made is made anew. A change of pyproject.toml alone installs no packages.
.venv/.installed: .venv/.locked pyproject.toml
	.venv/bin/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.venv/.locked: requirements.lock
	@base=$$("$(PYTHON)" -c 'import sys; print(sys._base_executable) if sys.version_info[:2] == (3, 11) else \
		sys.exit(f"Python 3.11 is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=/path/to/python3.11")') \
	&& rm -rf .venv && "$$base" -m venv .venv
	.venv/bin/pip install --no-deps --require-hashes -r requirements.lock
	@touch $@
