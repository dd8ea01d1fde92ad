# `make demo` and `make test` are all a newcomer needs; each sets up .venv first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint bench faults gpu clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 12); sys.exit(None if ok else "mmray needs Python 3.11 or 3.12; this is %s. Try: make PYTHON=python3.11 $(MAKECMDGOALS)" % sys.version.split()[0])'
	@echo "Setting up $(VENV): once, some minutes, about 2.5 GB"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[cluster,trackers,dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python jobs/demo.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks

faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

gpu: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.gpu

clean:
	rm -rf $(VENV) demo_out
