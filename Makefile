# `make help` lists the commands. On a fresh machine that has Python and make, each sets up what it needs in .venv.
PYTHON ?= python3
# The newest diffusers needs Python 3.11.
CONSTRAINTS ?= $(shell $(PYTHON) -c "import sys; print('constraints.txt' if sys.version_info >= (3, 11) else 'constraints-oldest.txt')")
BIN := .venv/bin
CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
# Python compiles what it imports; pip would take a minute more for all that nobody does.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c $(CONSTRAINTS)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile --no-loadscope-reorder

# Where Python is told to keep nothing that it compiled (images of containers do that), every start of a program would
# compile again, for many seconds.
export PYTHONDONTWRITEBYTECODE :=

# `make demo KEYS="train.steps=200" SEEDS=0-63` changes what the demo trains and samples.
RUN := runs/digits8_ddpm
SEEDS ?= 0-499
KEYS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test quick thorough slow lint types format docs durations clean

help: ## list the commands
	@grep -hE '^[a-z]+:.* ## ' $(MAKEFILE_LIST) | sed 's/:.* ## /\t/' | expand -t 12

demo: .venv/train ## train on real handwritten digits, sample, evaluate, say where the pictures are
	$(BIN)/python training/train.py --config digits8_ddpm --output $(RUN) --resume auto $(KEYS)
	rm -rf $(RUN)/demo
	$(BIN)/python sampling/sample.py --checkpoint $(RUN) --seeds $(SEEDS) --batch-size 250 --out $(RUN)/demo
	$(BIN)/python sampling/evaluate.py --samples $(RUN)/demo --config $(RUN)/config.yaml
	@echo "The pictures: $(RUN)/demo/grid.png, $(RUN)/samples, $(RUN)/denoise, $(RUN)/loss.png"

test: .venv/test lint types ## check style and types, and run every test but those marked thorough, slow or gpu
	$(PYTEST) $(if $(MARKS),-m "$(MARKS)")

thorough: .venv/test ## run what CI adds: kernels at their edges, FSDP2, several machines, the examples
	$(PYTEST) -m thorough

quick: .venv/test lint types ## the same in 90 seconds: the tests of what changed since the last commit, or the 500 fastest
	$(PYTEST) $$($(BIN)/python tests/structure/quick.py)

slow: .venv/test ## run the long lists that `make test` and CI leave out
	$(PYTEST) -m slow

lint: .venv/test ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test ## check types
	$(BIN)/mypy

format: .venv/test ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/test ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

durations: .venv/test ## measure how long each test file takes, for `make quick`
	$(PYTEST) --junitxml=.venv/tests.xml
	$(BIN)/python tests/structure/quick.py --record .venv/tests.xml

clean: ## remove the environment
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 10) or sys.exit('This needs Python 3.10 or later, and $(PYTHON) is %d.%d: make demo PYTHON=python3.11, for example' % sys.version_info[:2])"
	$(PYTHON) -m venv .venv

.venv/train: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(PIP) -e ".[train]"
	touch $@

.venv/test: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(PIP) -e ".[train,data,dev,onnx,mnist,app,docs]"
	touch $@ .venv/train
