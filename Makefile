# Every target sets up what it needs: on a fresh machine `make demo` and `make test` are all there is to do.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS := $(VENV)/.docs
BENCH := $(VENV)/.bench

.PHONY: demo paper gpu test lint docs bench lowest clean

# The main job on real data: two optimizers, each beside its central and its stable flow, and the pictures of it.
demo: $(INSTALLED)
	$(BIN)/python docs/examples/plot_digits.py
	$(BIN)/python docs/examples/plot_fashion.py

# The paper's Figures 2 to 11 at the small size: their runs, which go on where they were, and the pictures.
paper: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/dvi paper run --main || test $$? -eq 1
	for figure in 2 3 4 5 6 7 8 9 10 11; do $(BIN)/dvi paper figure $$figure || exit 1; done
	$(BIN)/dvi paper table --out runs/paper/small/table.md

# What the paper's experiments cost on the graphics card at hand; ten minutes.  Without a card: a try at the small size.
gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

# All tests; the examples in docstrings and on pages are among them.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS)
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html
	@echo "the pages are in docs/_build/html/index.html"

bench: $(BENCH)
	$(BIN)/python benchmarks/run.py $(ARGS)

$(INSTALLED): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(DOCS) $(BENCH): $(VENV)/.%: $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	touch $@

# The tests with the lowest versions that pyproject.toml admits, in an environment of their own.
lowest: lowest.txt pyproject.toml
	test -d $(VENV)-lowest || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install -q -c lowest.txt -e '.[all]' pytest pytest-xdist hypothesis
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n auto tests $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-lowest docs/_build docs/gallery runs
