PYTHON ?= python3

.PHONY: install search test test-all lint format clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The main job: search factors for the reference model at 8 times its window.
search: install
	.venv/bin/longrope launch

test: install
	.venv/bin/python -m pytest -m "not slow and not gpu"

# With the Ray kill tests; a few minutes more.
test-all: install
	.venv/bin/python -m pytest -m "not gpu"

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: install
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
