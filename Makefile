# The first Python among these that sftjax runs on; `make PYTHON=/path/to/python` overrides it.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)
PIP = .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt
DEPENDENCIES = pyproject.toml constraints.txt

.PHONY: quickstart test test-all lint clean

# Fine-tune a small Llama on a CPU, end to end; about five minutes on two cores.
quickstart: .venv/installed
	.venv/bin/python -m sftjax.train --config=configs/quickstart.py --workdir=runs/quickstart

test: .venv/installed-test
	.venv/bin/python -m pytest -q -n 2 --dist loadfile

# The long groups too; those that read $SFTJAX_FIXTURES are skipped where it is absent.
test-all: test
	.venv/bin/python -m pytest -q -m "(slow or long or multiprocess) and not (parity or tpu or browser)"

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Everything that make made, except runs/.
clean:
	rm -rf .venv .venv-313 .venv-tpu .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info \
		"$${XDG_CACHE_HOME:-$$HOME/.cache}/sftjax-tests"

.venv/bin/python:
	@test -n "$(PYTHON)" || \
	{ echo "no Python 3.11 to 3.13 found; install one, or: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Stamps: installed again only when what is to be installed changes.
.venv/installed: $(DEPENDENCIES) | .venv/bin/python
	$(PIP) -e .
	@touch $@

.venv/installed-test: $(DEPENDENCIES) | .venv/bin/python
	$(PIP) -e '.[test]'
	@touch $@ .venv/installed
