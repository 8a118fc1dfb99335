# Every target makes its own environment: .venv with the pinned versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-all check verify-gguf clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## text -> ternary model -> GGUF, on the CPUs at hand
	$(BIN)/python jobs/pretrain.py

# Tests share out the cores, a thread for each; those with a Ray cluster wait more than they work, and
# two files of them go beside each other.
APART := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not ray' -n auto --dist worksteal

test: check $(STAMP)  ## what CI runs
	$(APART)
	$(BIN)/python -m pytest -m 'ray and not slow' -n 2 --dist loadfile

test-all: check $(STAMP)  ## the slow ones too
	$(APART)
	$(BIN)/python -m pytest -m 'slow or ray'

check: $(STAMP)  ## linters, import rules, types
	$(BIN)/ruff format --check bitray jobs scripts tests
	$(BIN)/ruff check bitray jobs scripts tests
	$(BIN)/lint-imports
	$(BIN)/mypy

verify-gguf: $(STAMP)  ## builds a real llama.cpp (minutes) and checks every kind of export with it
	$(BIN)/python -c 'import llama_cpp' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[verify]'
	$(BIN)/python scripts/verify_gguf.py

clean:
	rm -rf .venv build dist *.egg-info
