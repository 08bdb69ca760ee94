# `make` lists the targets. PYTHON picks the interpreter of a new .venv: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAST := tests/models/test_eit.py tests/models/test_registry.py tests/models/test_complexity.py tests/test_config.py \
  tests/test_plots.py tests/weights/test_load.py tests/training/test_optim.py tests/training/test_loss.py \
  tests/data/test_layouts.py tests/data/test_images.py tests/analysis/test_frequency.py tests/reproduce/test_verdict.py \
  tests/project/test_imports.py
# An environment made by uv has no pip. Python compiles what is imported; all of PyTorch would take half a minute.
PIP := installer="$(BIN)/python -m pip --disable-pip-version-check install --no-compile"; \
  $(BIN)/python -c 'import pip' 2>/dev/null || installer="uv pip install --python $(BIN)/python"; \
  $$installer --quiet --constraint constraints.txt

.PHONY: help demo test test-fast test-slow check check-results check-project gpu lint format readme docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, train the digits recipe (under a minute on 2 cores), predict a few"
	@echo "make test       set up, run the tests (about 6 minutes on two cores)"
	@echo "make test-fast  the tests of single functions, in under a minute"
	@echo "make test-slow  the tests that make test leaves out"
	@echo "make check      check-results and check-project, which are:"
	@echo "make check-results  the tables and sentences of README.md and docs/ against results/"
	@echo "make check-project     what README.md, docs/ and examples/ say to run, the site, the wheel"
	@echo "make gpu        on a machine with a GPU: check, measure, train, in 10 minutes; GPU=\"--part check\" and other words"
	@echo "make lint       formatting, lint and types"
	@echo "make format     rewrite the sources as lint wants them"
	@echo "make readme     rebuild the tables and the figure of README.md and docs/ from the zoo and results/"
	@echo "make docs       build the documentation into site/: open site/index.html"
	@echo "make clean      remove .venv, site/ and caches"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11: install Python 3.11 or newer, or name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }

define install
  @echo "installing the package into $(VENV) (a minute or two; about 5.5 GB)"
  @$(PIP) --editable '$(1)' || \
    { echo "installing failed: see the lines above; most often there is no network, or no room (5.5 GB) for PyTorch"; exit 1; }
endef

# The stamps are newer than what they were made from, so a changed dependency is installed again.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,.)
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,.[test])
	@touch $(VENV)/installed $@

demo: $(VENV)/installed
	@rm -rf runs/demo
	@$(BIN)/eit train digits out=runs/demo
	@$(BIN)/python tools/demo_images.py runs/demo/images
	@echo "predictions for a few scanned digits that were held out (the folder name is the true class):"
	@$(BIN)/eit predict runs/demo runs/demo/images --top 3
	@echo "try next: $(BIN)/eit train digits model.family=vit out=runs/vit"

# Two processes with one thread each: most tests wait for imports or subprocesses.
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Functions of one module, without training or subprocesses.
test-fast: $(VENV)/installed-test
	$(BIN)/python -m pytest -q -n 2 $(FAST)

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

# What README.md and docs/ say against results/, and committed numbers against plain loops.
check-results: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 -m 'results and not slow'

# What README.md, docs/ and examples/ say to run; the site, the wheel, `make gpu` on the CPU.
# A file is for one process: its tests share folders that are long to make.
check-project: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'project and not slow'

check: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m '(results or project) and not slow'

# With what is installed: the interpreter of .venv where it is there, else PYTHON.
gpu:
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu $(GPU)

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

readme: $(VENV)/installed
	$(BIN)/python tools/build_readme.py

# The variable silences an advertisement of another tool, which would be the one warning.
docs: $(VENV)/installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
