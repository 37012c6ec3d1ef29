# make help          these lines
# make setup         install into .venv, 7 GB (nothing is done when nothing changed)
# make test          every test, on the CPU; FILES=tests/kernels for those of one room
# make test-cluster  the launcher on two Slurm nodes and two ssh hosts made here: Debian, root
# make test-image    the container image, built on a plain Debian: root, about 15 GB, no Docker
# make test-gpu      the kernels on a GPU: correctness, graphs, memory; needs no setup
# make docs          write the generated files: docs/limits.md, the flags that the plan knows
# make lint          ruff, mypy, who may import whom
# make demo          pretrain a small Llama with five activations on text that needs no download
# make bench         the activation against its peers on the CPU: runs/bench/cpu.{txt,csv,png}
# make bench-gpu     the same on a GPU, at the sizes of real models: runs/bench/cuda.{txt,csv,png}

PYTHON ?= python3
BIN := .venv/bin
# Two files of tests at a time: trainings of one or two processes that wait for one another.
PYTEST_TWICE := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The container's own Python where nothing is set up: it has PyTorch, Triton, pytest and pytest-xdist.
ON_GPU = PYTHONPATH=$(CURDIR):$$PYTHONPATH $(if $(wildcard .venv/installed),$(BIN)/python,$(PYTHON))

# PyTorch builds C++ extensions with the ninja that is installed here.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup test test-gpu test-image test-cluster docs lint demo bench bench-gpu

help:
	@sed -n 's/^# make/make/p' $(firstword $(MAKEFILE_LIST))

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "megatron_xielu needs Python 3.12 or newer; this is %s (set PYTHON=…)" % sys.version.split()[0])'
	@echo 'installing into .venv: about 7 GB, 3 to 5 minutes; the last of them, "Installing collected packages", are silent'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@
	@echo 'installed: source .venv/bin/activate, or $(BIN)/python in place of python'

test: setup
	$(PYTEST_TWICE) $(FILES)

test-gpu:
	$(ON_GPU) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "make $@: PyTorch sees no CUDA device here")'
	$(ON_GPU) -m pytest --numprocesses 8 -m gpu $(or $(FILES),tests/kernels tests/tools/test_bench.py)

test-image:
	tests/image/run.sh

# 77: this machine cannot run them, and install.sh has said why.
test-cluster: setup
	@tests/slurm/install.sh; status=$$?; \
	if [ $$status = 77 ]; then exit 0; elif [ $$status != 0 ]; then exit $$status; fi; \
	$(PYTEST_TWICE) tests/slurm tests/report/test_report_page.py::test_report_in_a_browser

docs: setup
	$(BIN)/python tools/make_docs.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

demo: setup
	$(BIN)/python tools/compare_activations.py tiny --out runs/demo

bench: setup
	$(BIN)/python tools/bench/bench_activation.py --device cpu

bench-gpu:
	$(ON_GPU) tools/bench/bench_activation.py --device cuda
