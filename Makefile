# make demo | test | sanitize | bench | lint | gates | clean. Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two workers with one thread each: tests compare numbers, and threads of several workers would only fight for the cores.
WORKERS ?= 2
TEST_THREADS ?= 1
PYTEST_ARGS ?=
SOURCES := $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')

.PHONY: demo test test-cpu test-triton sanitize bench lint format gates clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@sed -n '1s/^# //p' $(firstword $(MAKEFILE_LIST))

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(VENV)/.installed

$(VENV)/.built: $(VENV)/.installed setup.py $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $(VENV)/.built

demo: $(VENV)/.built
	$(BIN)/sparselottery imp --data digits --out runs/demo

# Both halves always run, so that one failure does not hide another.
test: $(VENV)/.built
	@if [ -n "$$SPARSELOTTERY_DATA" ]; then echo "SPARSELOTTERY_DATA=$$SPARSELOTTERY_DATA"; else echo \
	  "SPARSELOTTERY_DATA is not set: tests on MNIST, Fashion-MNIST and CIFAR-10 are left out (see CONTRIBUTING.md)"; fi
	@status=0; $(MAKE) --no-print-directory test-cpu || status=1; $(MAKE) --no-print-directory test-triton || status=1; exit $$status

test-cpu: $(VENV)/.built
	OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest tests --ignore tests/triton -n $(WORKERS) $(PYTEST_ARGS) \
	  $(if $(JUNIT),--junitxml $(JUNIT)/cpu.xml)

# A process of their own: Triton reads TRITON_INTERPRET once, when it is imported.
test-triton: $(VENV)/.built
	TRITON_INTERPRET=1 OMP_NUM_THREADS=$(TEST_THREADS) $(BIN)/python -m pytest tests/triton -n $(WORKERS) $(PYTEST_ARGS) \
	  $(if $(JUNIT),--junitxml $(JUNIT)/triton.xml)

# The tests of the CPU kernels on a build of its own with AddressSanitizer and UBSan; needs g++.
sanitize: $(VENV)/.installed
	$(BIN)/python tools/sanitize.py

bench: $(VENV)/.built
	$(BIN)/sparselottery bench

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# What can be proved about the kernels without a GPU: they compile, without spills, to the instructions that were meant.
gates: $(VENV)/.built
	$(BIN)/python tools/simd_gate.py
	$(BIN)/python tools/nvcc_gate.py || { [ $$? -eq 2 ] && echo "csrc/cuda was not compiled: no CUDA toolkit here"; }
	$(BIN)/python -m sparselottery.kernels.aot

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find sparselottery -name '*.so' -delete
	find . -name __pycache__ -prune -exec rm -rf {} +
