# make demo   sets everything up and finds the in-context heads of a real model
# make test   sets everything up and runs the tests
# make test-all   runs also the slow tests, with more kills, plantings and random examples
# make coverage   runs the tests and reports the lines and branches they reach
# make mutants    changes the measures at random and lists the changes that no test notices
# make test-peers   compares with TransformerLens, in a separate environment
# make test-wheel   builds a wheel and runs the demo in an environment with only the wheel
# make experiments  runs the paper's claims on the demo model, each with a verdict
# make gpu    on a machine with a GPU, runs the tests that need one, and its benchmark
# make docs   writes the API pages from the docstrings into build/docs
# make bench  times the sweep against plain forwards

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers with one thread each: most test models are too small for several threads.
WORKERS := --numprocesses 2 --dist loadfile
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all coverage mutants test-peers test-wheel experiments bench gpu docs lint \
	clean

demo: $(INSTALLED)
	$(BIN)/twotower demo

test: $(INSTALLED)
	tests/install_browser.sh $(BIN)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

test-all: $(INSTALLED)
	tests/install_browser.sh $(BIN)
	TWOTOWER_KILLS=100 TWOTOWER_PLANTINGS=20 TWOTOWER_EXAMPLES=300 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest $(WORKERS) -m "slow or not slow"

coverage: $(INSTALLED)
	PYTHONPATH=$(CURDIR)/tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) \
		--cov --cov-config=$(CURDIR)/tests/coverage.ini --cov-report=
	PYTHONPATH=$(CURDIR)/tests OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) \
		tests/models/test_families.py -m "slow or not slow" --cov --cov-append \
		--cov-config=$(CURDIR)/tests/coverage.ini --cov-report=json:build/coverage.json
	$(BIN)/python tests/coverage_page.py build/coverage.json

mutants: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt mutmut
	$(BIN)/python tests/mutants.py

test-peers:
	test -d .venv-peers || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[peers]' pytest pytest-timeout
	.venv-peers/bin/python -m pytest tests/peers

test-wheel:
	rm -rf build/wheel && mkdir -p build/wheel
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt "$$(ls build/wheel/*.whl)[report]"
	cd build/wheel && venv/bin/twotower experiments list && venv/bin/twotower demo \
		&& venv/bin/twotower report runs/demo.zarr

experiments: $(INSTALLED)
	$(BIN)/twotower experiments run --all

bench: $(INSTALLED)
	$(BIN)/python benchmarks/sweep.py

gpu: $(INSTALLED)
	$(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' \
		|| { echo 'this machine has no GPU that torch can use' >&2; exit 1; }
	$(BIN)/python -m pytest tests/measures/test_cuda.py
	$(BIN)/python benchmarks/gpu.py --promote

docs: $(INSTALLED)
	$(BIN)/pdoc -d numpy -o build/docs twotower '!twotower.cli' '!twotower.runs'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Exact versions come from constraints.txt; the stamp file avoids a second installation.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "twotower needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) runs
