# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
WORKDIR ?= runs/demo

.PHONY: demo test test-all lint docs

demo: $(VENV)/.installed
	$(RUN) -m gptjax.train --config=configs/quickstart.py --workdir=$(WORKDIR)

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 --dist=worksteal --durations=20 -m "not slow"

test-all: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 --dist=worksteal

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

# Not --quiet, which would also keep --strict from seeing what is wrong. The variable is for the
# theme's own news.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict -f docs/site/mkdocs.yml

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer, please"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(RUN) -m pip install --quiet -e '.[dev]'
	touch $@
