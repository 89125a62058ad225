# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
WORKDIR ?= runs/demo

# What training needs has to work with every version that requirements.txt admits.
CORE = tests/test_config.py tests/test_keys.py tests/model/test_config.py tests/model/test_layers.py \
  tests/optim/test_optimizer.py tests/data/test_cache.py tests/data/test_packing.py \
  tests/training/test_checkpoints.py tests/training/test_loop.py::test_learns_and_reports
NEWEST_PYTHON ?= python3.13

.PHONY: demo serve test test-all test-lowest test-newest lint docs

demo: $(VENV)/.installed
	$(RUN) -m gptjax.train --config=configs/quickstart.py --workdir=$(WORKDIR)

# A chat model of 135 M parameters, at http://localhost:8000; the first time it is fetched.
serve: $(VENV)/.installed-serve
	$(RUN) -m gptjax.serve --name=smollm2 \
	  --checkpoint=$$($(RUN) -m experiments.datasets smollm2)/SmolLM2-135M-Instruct.Q4_1.gguf

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 --dist=worksteal --durations=20 -m "not slow"

test-all: $(VENV)/.installed-dev
	$(RUN) -m pytest -n 2 --dist=worksteal

# The core with the lowest versions, and with the newest on a newer Python.
test-lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest -q -n 2 -m "not slow" $(CORE)

test-newest: $(VENV)-newest/.installed
	$(VENV)-newest/bin/python -m pytest -q -n 2 -m "not slow" $(CORE)

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

$(VENV)/.installed-serve: pyproject.toml $(VENV)/.installed
	$(RUN) -m pip install --quiet -e '.[serve]' 'gguf>=0.17'
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(RUN) -m pip install --quiet -e '.[dev]'
	touch $@

$(VENV)-lowest/.installed: requirements.txt
	$(PYTHON) -m venv --clear $(VENV)-lowest
	sed 's/>=/==/' requirements.txt > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/python -m pip install --quiet -r $(VENV)-lowest/lowest.txt pytest pytest-xdist
	touch $@

$(VENV)-newest/.installed: requirements.txt
	$(NEWEST_PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet -r requirements.txt pytest pytest-xdist
	touch $@
