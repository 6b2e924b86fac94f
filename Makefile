# make demo   set everything up and watch a real model forget real facts
# make test   set everything up and run the tests
# make lint   ruff, mypy, clang-format, zizmor
# make bench  the CPU benchmarks, half an hour on two cores; then the tables and plots of README and docs/
# make docs   the documentation as a site, with an API reference, in build/site/
# make kernels-report   registers, shared memory and spills of every Triton kernel
# make cuda-report      the same of the CUDA C++ ones, where nvcc built them

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu)

.PHONY: demo test lint format bench docs kernels-report cuda-report clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml setup.py constraints.txt $(CPP)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m examples.demo $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP) tests/*.cpp
	$(BIN)/zizmor --offline --quiet .github

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) tests/*.cpp

# BENCH= runs them in full, hours: what is committed. Whole runs (end_to_end, compare_methods) take hours too: their
# tables and plots are made again from the committed results
BENCH ?= --short
bench: $(INSTALLED)
	$(BIN)/python -m examples.demo_model
	$(BIN)/python -m pytest benchmarks $(BENCH)
	$(BIN)/python -m benchmarks.report --pages

# a broken link, anchor or reference fails
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

kernels-report: $(INSTALLED)
	$(BIN)/python -m benchmarks.kernels

cuda-report: $(INSTALLED)
	$(BIN)/python -m benchmarks.cuda_report

clean:
	rm -rf $(VENV) .cache build dist demo_output *.egg-info pmc_fast/*.so
