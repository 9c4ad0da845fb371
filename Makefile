PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
# of pyproject.toml; with spark too, the recipes of docs/parquet.md are run by Spark
EXTRAS ?= dev

.PHONY: demo test docs clean

# The main job on real data: noisy digits, recorded, reduced, ranked.
demo: $(INSTALLED)
	$(BIN)/hydra-pipe run pipelines/digits.py runs/digits --set noise=0.1 --set lr=0.2
	@$(BIN)/python pipelines/digits.py runs/digits

# Everything that a change must pass.
test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	# a test that has stood still for too long ends its process, and would be given to the next one
	$(BIN)/pytest -n auto --dist loadgroup --max-worker-restart 0

# The documentation as a site.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -q docs build/site
	@echo build/site/index.html

$(INSTALLED): pyproject.toml constraints.txt hydra_pipe/reduction/_loops.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[$(EXTRAS)]'
	# on all cores, where pip takes one; what is written for other versions of Python is passed over, as pip does
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib || true
	touch $@

clean:
	rm -rf $(VENV) runs
