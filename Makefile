# `make ppo` on a fresh machine sets everything up in .venv and runs the main job.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup ppo test lint format audit clean

setup: .venv/.installed

.venv/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	touch $@

ppo: setup
	$(BIN)/python -m rlhf_recipes launch scripts/ppo.py

test: setup
	$(BIN)/pytest -n 2 --dist loadfile $(TESTS)

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
