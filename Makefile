# PEFT Studio backend. `make quickstart` is the front door; `make help` lists the rest.
HOST ?= $(or $(PEFT_STUDIO_HOST),127.0.0.1)
PORT ?= $(or $(PEFT_STUDIO_PORT),8000)
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: help setup quickstart serve test test-slow check bench gpu-check clean

help:
	@echo "make quickstart  set up, start the server, fine-tune the embedded model over HTTP"
	@echo "make serve       the server alone (HOST=, PORT=)"
	@echo "make test        the tests; make test-slow: long fault runs"
	@echo "make check       linters, types, import contracts"
	@echo "make bench       benchmarks, as ratios"
	@echo "make gpu-check   proves every method on a GPU; GPU_CHECK=--cpu for what needs none"

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

quickstart: setup
	@$(PY) quickstart/run.py --host $(HOST) --port $(PORT)

serve: setup
	@cd backend && PEFT_STUDIO_HOST=$(HOST) PEFT_STUDIO_PORT=$(PORT) exec ../$(PY) main.py

# Two at a time, a file each, with one thread for each engine: two engines of two threads on two cores wait for each
# other most of the time.
test: setup
	cd backend && OMP_NUM_THREADS=1 ../$(PY) -m pytest tests/ -n 2 --dist loadfile

test-slow: setup
	cd backend && ../$(PY) -m pytest tests/ -m slow

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy backend/main.py backend/reproduce.py backend/core backend/domain backend/store backend/services backend/api backend/engine
	cd backend && ../$(VENV)/bin/lint-imports --config ../pyproject.toml

bench: setup
	cd backend && for file in ../bench/bench_*.py; do ../$(PY) $$file || exit 1; done

# Needs a CUDA machine, and no network. GPU_CHECK=--cpu runs what a CPU can.
gpu-check: setup
	cd backend && PYTHONPATH=../bench ../$(PY) -m gpu_check $(GPU_CHECK)

clean:
	rm -rf $(VENV) .cache .studio
