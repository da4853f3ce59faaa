# make demo, make demo-train, make test, make check, make bench, make bench-judge, make wheel. Everything lands in .venv, which is made on the first call.
# brainldm itself is the command; make is only the doorman.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo demo-train test check bench bench-judge wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $@

demo: $(STAMP)
	$(BIN)/brainldm demo demo

demo-train: $(STAMP)
	$(BIN)/brainldm demo demo-train --train

test: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-judge: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/judge_cost.py

bench: $(STAMP)
	$(BIN)/python bench/bench.py

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) dist demo demo-train
