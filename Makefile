# The front door. `make demo` and `make test` set everything up on first use; a second run goes straight to work.
#
#   make demo    train on the emoji, evaluate, index, search; leaves runs/demo/index.html
#   make test    all tests
#   make bench   all benchmark rows; `make bench ROWS="-k forward"` for some
#   make lint    ruff, clang-format, mypy
#   make gpu     on a machine with a GPU: build, test and measure there, in eight minutes, or `make gpu MINUTES=7`; results in $OUT or
#                benchmarks/results
#   make clean   remove what was built
PYTHON ?= python3
ROWS ?=
MINUTES ?= 8
BIN := .venv/bin

.PHONY: demo test bench lint format gpu clean

demo: .venv/built
	$(BIN)/setemb demo --out runs/demo

test: .venv/built
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: .venv/built
	$(BIN)/python -m pytest benchmarks $(ROWS)

lint: .venv/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu')
	$(BIN)/mypy

format: .venv/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu')

# Uses the python that is there, with its own torch and CUDA: installs nothing.
gpu:
	PYTHON=$(PYTHON) MINUTES=$(MINUTES) bash benchmarks/gpu.sh

# Torch comes first: the extension is built against it.
.venv/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "setemb needs python >= 3.10; $(PYTHON) is $$($(PYTHON) --version 2>&1). Use make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy ninja pybind11 'setuptools>=77' wheel
	@touch $@

.venv/built: .venv/torch pyproject.toml setup.py $(shell find csrc -type f)
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

.venv/linters: .venv/built
	$(BIN)/python -m pip install -q -c constraints.txt 'ruff' 'mypy' 'clang-format' 'pre-commit'
	@touch $@

clean:
	rm -rf .venv build *.egg-info setemb_kernels/*.so
