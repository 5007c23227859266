# PEFT Studio backend. `make quickstart` is the front door; `make help` lists the rest.
HOST ?= $(or $(PEFT_STUDIO_HOST),127.0.0.1)
PORT ?= $(or $(PEFT_STUDIO_PORT),8000)
# The file of the API key that `make serve KEY=1` makes.
KEY_FILE ?= $(or $(PEFT_STUDIO_API_KEY_FILE),$(or $(PEFT_STUDIO_HOME),$(HOME)/.local/share/peft-studio)/api-key)
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: help setup setup-dev quickstart serve test test-fast test-slow test-browser pictures test-pythons check check-requirements check-container audit lock bench families gpu-check clean

help:
	@echo "make quickstart  set up, start the server, fine-tune the embedded model over HTTP"
	@echo "make serve       the server alone (HOST=, PORT=); KEY=1: with an API key, which is made and shown the first time"
	@echo "make test        the tests; make test-fast: those without engines; make test-slow: long fault runs"
	@echo "make test-browser  the pages in Chromium, which must be installed (Debian: apt-get install chromium)"
	@echo "make pictures    the README's pictures, from a real run in Chromium"
	@echo "make check       linters, types, import contracts"
	@echo "make audit       known vulnerabilities of the tested versions (asks the package index)"
	@echo "make check-container  every step of the Dockerfile, without a container engine (Linux, as root)"
	@echo "make bench       benchmarks, as ratios"
	@echo "make families    every model family of transformers in small; writes docs/families.md"
	@echo "make setup       the environment alone (PYTHON=python3.12: with that Python)"
	@echo "make lock        the exact versions anew, from pyproject.toml (UPGRADE=1: the newest)"
	@echo "make gpu-check   proves every method on a GPU; GPU_CHECK=--cpu for what needs none"

# The service alone, and with what tests and linters need.
setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: requirements.txt requirements/cuda-constraints.txt
	$(call check_python)
	@$(PYTHON) scripts/make_environment.py $(VENV) requirements.txt --mark $@

$(VENV)/.installed-dev: backend/requirements.txt requirements.txt requirements/cuda-constraints.txt requirements/dev.txt
	$(call check_python)
	@$(PYTHON) scripts/make_environment.py $(VENV) backend/requirements.txt --mark $@
	@touch $(VENV)/.installed

# In words that every Python understands, the second one too.
define check_python
	@command -v $(PYTHON) > /dev/null || { echo "$(PYTHON) is not installed. Python 3.11 to 3.14 is needed."; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v[:2] <= (3, 14) or sys.exit("Python 3.11 to 3.14 is needed; $(PYTHON) is %d.%d. With another one: make ... PYTHON=python3.12" % v[:2])'
endef

quickstart: setup
	@$(PY) quickstart/run.py --host $(HOST) --port $(PORT)

serve: setup
	@cd backend && $(if $(KEY),../$(PY) -m core.api_key_file "$(KEY_FILE)" && PEFT_STUDIO_API_KEY_FILE="$(KEY_FILE)") \
		PEFT_STUDIO_HOST=$(HOST) PEFT_STUDIO_PORT=$(PORT) exec ../$(PY) main.py

# Two at a time, a file each, with one thread for each engine: two engines of two threads on two cores wait for each
# other most of the time.
test: setup-dev
	cd backend && OMP_NUM_THREADS=1 ../$(PY) -m pytest tests/ -n 2 --dist loadfile

# No engines and no torch, which the plugin holds: what takes a tenth of the time finds most of what breaks.
test-fast: setup-dev
	cd backend && ../$(PY) -m pytest tests/ -p tests.support.no_engine -m "not engine and not slow and not gpu and not browser" -n 2 --dist loadfile

test-slow: setup-dev test-pythons
	cd backend && ../$(PY) -m pytest tests/ -m slow

# The pages in a real browser. Chromium is the distribution's; TEST_BROWSER names another. BROWSER_TESTS: more for pytest.
test-browser: setup-dev
	cd backend && OMP_NUM_THREADS=1 ../$(PY) -m pytest tests/browser -m browser -n 2 --dist loadfile $(BROWSER_TESTS)

pictures: setup-dev
	@$(PY) scripts/make_pictures.py

# The fast tests with every other Python of this machine that the requirements name, each in an environment of its own.
test-pythons: setup-dev
	@$(PY) scripts/other_pythons.py

check: setup-dev check-requirements
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/hadolint Dockerfile
	$(VENV)/bin/mypy backend bench quickstart scripts container examples
	cd backend && ../$(VENV)/bin/lint-imports --config ../pyproject.toml
	@$(PY) scripts/settings_table.py
	@$(PY) scripts/vendor_web.py

# For every platform and Python that the README names, against the package index alone.
check-requirements: setup-dev
	@$(PY) scripts/check_resolution.py

# Builds the image and runs it in a root directory of its own: scripts/container_steps.py.
check-container: setup-dev
	@$(PY) scripts/container_steps.py

# Known vulnerabilities of the tested versions, as the package index knows them. Needs the internet, and uv's own cache.
audit: setup-dev
	$(VENV)/bin/uv tool run pip-audit --strict --require-hashes --disable-pip --no-deps \
		--requirement requirements/tested-set.txt

lock: setup-dev
	@$(PY) scripts/lock_requirements.py $(if $(UPGRADE),--upgrade)

bench: setup-dev
	cd backend && for file in ../bench/bench_*.py; do ../$(PY) $$file || exit 1; done

# An hour on two cores. FAMILIES="llama mamba": those alone, and no table.
families: setup-dev
	cd backend && PYTHONPATH=../bench OMP_NUM_THREADS=1 ../$(PY) -m families $(FAMILIES)

# Needs a CUDA machine, and no network. GPU_CHECK=--cpu runs what a CPU can.
gpu-check: setup-dev
	cd backend && PYTHONPATH=../bench ../$(PY) -m gpu_check $(GPU_CHECK)

clean:
	rm -rf $(VENV) .venv-* .cache .studio
