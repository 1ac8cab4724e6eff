# make demo    set everything up, then run a real guest and show what it did
# make test    set everything up, then run the linters and all tests but the slow ones
# Both start from a Debian machine with root, make, git and python3, and repeat no long step the second time.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.DELETE_ON_ERROR:
.PHONY: help demo test slow check guest venv packages clean

help:
	@echo 'make demo    set everything up and run a real guest'
	@echo 'make test    set everything up and run the tests, linters among them'
	@echo 'make slow    the tests that take minutes'
	@echo 'make check   only the linters: ruff, mypy --strict'
	@echo 'make guest   set everything up and build the guest kit'
	@echo 'make venv    the virtual environment'
	@echo 'make clean   remove what was made here (the guest kit stays in its cache)'

demo: guest
	$(VENV)/bin/python scripts/demo.py

test: guest
	$(VENV)/bin/pytest -m "not slow"

slow: guest
	$(VENV)/bin/pytest -m "slow and not by_hand"

check: venv
	$(VENV)/bin/pytest tests/unit/test_linters.py

# Keyed by its inputs: it answers at once when there is nothing to build.
guest: venv
	$(VENV)/bin/vmrun guest build

# An editable installation compiles nothing. Where byte code cannot be written later (somebody else's checkout,
# PYTHONDONTWRITEBYTECODE), every start would compile again what it imports, which doubles its time.
venv: $(STAMP)
	@$(VENV)/bin/python -m compileall -q vmrun devices

# Asks dpkg every time (a moment), so a package that went away is missed; installs only what is missing.
packages:
	@scripts/setup

# Python 3.11 puts setuptools there: a .pth file of its own is an import hook in the way of every start, 2 ms.
$(STAMP): pyproject.toml | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'vmrun: $(PYTHON) is older than Python 3.11: make PYTHON=/path/to/a/newer/python3'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo 'vmrun: $(PYTHON) cannot make virtual environments: make PYTHON=/usr/bin/python3'; exit 1; }
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check --progress-bar on -e '.[dev]'
	@$(VENV)/bin/pip uninstall --disable-pip-version-check -q -y setuptools 2>/dev/null
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
