# `make ppo` on a fresh machine sets everything up in .venv and runs the main job.
PYTHON ?= python3
BIN := .venv/bin
# Without a GPU, the CPU build of torch, several GB smaller, if its index answers within 3 seconds; pip adds it to whatever it is
# configured with. `make setup CPU_TORCH=` asks for nothing, for a machine whose GPUs are elsewhere (a login node).
CPU_TORCH ?= https://download.pytorch.org/whl/cpu
ANSWER := import signal, sys, urllib.request; signal.alarm(3); urllib.request.urlopen(sys.argv[1] + "/torch/")
CPU_INDEX = $(if $(CPU_TORCH),$(shell command -v nvidia-smi >/dev/null || test -e /dev/nvidia0 || \
	{ $(PYTHON) -c '$(ANSWER)' $(CPU_TORCH) && echo --extra-index-url $(CPU_TORCH); } 2>/dev/null))

.PHONY: setup ppo test lint format audit clean

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q $(CPU_INDEX) -r requirements.txt
	touch $@

ppo: setup
	$(BIN)/python -m rlhf_recipes launch scripts/ppo.py

test: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(or $(TESTS),--ignore=tests/test_processes.py)
	$(if $(TESTS),,$(BIN)/pytest tests/test_processes.py) # which has both cores to itself

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# known vulnerabilities of exactly what .venv holds; asks PyPI, so it is no part of CI. Without --strict, what could not be
# looked up counts as clean.
audit: setup
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --disable-pip-version-check -q pip-audit==2.10.0
	$(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//' > .venv/audit/requirements.txt
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip -r .venv/audit/requirements.txt

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info
