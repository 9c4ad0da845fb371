PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# of pyproject.toml; with spark too, the recipes of docs/parquet.md are run by Spark
EXTRAS ?= dev
PYTEST := $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# Byte code is kept, whatever the environment says: else each process that a test starts compiles the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test quick lint types tests quick-tests docs clean

# The main job on real data: noisy digits, recorded, reduced, ranked, and shown on a page.
demo: $(VENV)/with-pipelines,report
	$(BIN)/hydra-pipe run pipelines/digits.py runs/digits --set noise=0.1 --set lr=0.2
	@$(BIN)/python pipelines/digits.py runs/digits
	$(BIN)/hydra-pipe report runs/digits

# Everything that a change must pass, side by side; each says its part to the end, and one that fails fails all.
test: $(VENV)/with-$(EXTRAS)
	@$(MAKE) --no-print-directory --keep-going -j3 lint types tests

# What can be asked after each edit: the same without tests that take processes, a browser, a site or trainers.
quick: $(VENV)/with-$(EXTRAS)
	@$(MAKE) --no-print-directory --keep-going -j3 lint types quick-tests

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

# A test that has stood still for too long ends its process, and must not be given to the next one.
tests:
	$(PYTEST) --durations=40

quick-tests:
	$(PYTEST) -m 'not slow'

# The documentation as a site.
docs: $(VENV)/with-$(EXTRAS)
	$(BIN)/python -m sphinx -W --keep-going -q -j auto docs build/site
	@echo build/site/index.html

# Byte code for tests is made on all cores, where pip takes one; the demo imports a tenth of the files, and makes their own.
$(VENV)/with-%: pyproject.toml constraints.txt hydra_pipe/maths/_rows.c hydra_pipe/reduction/_kernels.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[$*]'
	$(if $(findstring dev,$*),$(BIN)/python -m compileall -qq -j 0 -x "/tests/" $(VENV)/lib || true)
	touch $@

clean:
	rm -rf $(VENV) runs
