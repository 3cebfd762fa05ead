# Two commands for a fresh machine that has Python and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
CORES := $(shell $(PYTHON) -c "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())")
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)

# `make demo KEYS="train.steps=200" SEEDS=0-63` changes what the demo trains and samples.
RUN := runs/digits8_ddpm
SEEDS ?= 0-499
KEYS ?=

.PHONY: demo test lint types clean

demo: .venv/train
	$(LAUNCH) training/train.py --config digits8_ddpm --output $(RUN) --resume auto $(KEYS)
	rm -rf $(RUN)/demo
	$(LAUNCH) sampling/sample.py --checkpoint $(RUN) --seeds $(SEEDS) --batch-size 250 --out $(RUN)/demo
	$(BIN)/python sampling/evaluate.py --samples $(RUN)/demo --config $(RUN)/config.yaml
	@echo "The pictures: $(RUN)/demo/grid.png, $(RUN)/samples, $(RUN)/denoise, $(RUN)/loss.png"

test: .venv/test lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) --dist loadfile

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/train: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[train]"
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(PIP) -e ".[train,data,dev]"
	touch $@ .venv/train

clean:
	rm -rf .venv
