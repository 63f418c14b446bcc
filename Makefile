# Everything runs in .venv, which the first command makes. A machine needs no more
# than make and Python 3.10 or newer: `make demo`, `make test`.

PYTHON ?= python3
PYTHON_OLDEST ?= python3.10
PYTHON_NEWEST ?= python3.13
VENV := .venv
BIN := $(VENV)/bin
# JAX and the compiler of TPUs, without TensorFlow.
ACCELERATORS := .venv-accelerators

# TensorFlow's start-up messages; pip's advice to upgrade; a backend that the user's
# ~/.keras/keras.json may name.
export TF_CPP_MIN_LOG_LEVEL ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export KERAS_BACKEND := tensorflow

.DEFAULT_GOAL := help
.PHONY: help demo flow examples docs test coverage test-slow test-oldest test-newest bench accelerators \
	accelerators-quick gpu-bundle gpu-compile gpu-quick doctest examples-smoke lint format dist package clean

help:  ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) \
		| awk -F '|' '{ printf "%-26s%s\n", $$1, $$2 }'
	@echo "Another Python than python3: make PYTHON=python3.12 demo"

demo: $(VENV)/.installed-plot  ## Train, compare, sample and save a language model (minutes)
	$(BIN)/python examples/character_language_model.py

flow: $(VENV)/.installed-examples  ## See gradients vanish and explode, draw a figure (minutes)
	$(BIN)/python examples/vanishing_and_exploding.py

# Of git's own files these write some, and say so: examples, docs, bench, accelerators,
# format. What the others write is ignored by git, and removed by make clean.
KINDS := character_language_model flowers draw_digits read_digits sunspots rewrite_numbers

examples: $(VENV)/.installed-examples  ## Train the kinds of RNN; overwrites saved_models (a quarter of an hour)
	@set -e; for kind in $(KINDS); do \
		$(BIN)/python examples/$$kind.py --output-dir saved_models; \
	done

docs: $(VENV)/.installed-test  ## Draw every figure again; overwrites figures, tables, docs/api.md
	$(BIN)/python docs/build.py

# File by file in two processes: most of a test's time is TensorFlow tracing a graph, on
# one core.
IN_TWO := --numprocesses 2 --dist loadfile

test: $(VENV)/.installed-test  ## Run the tests
	$(BIN)/python -m pytest -m "not slow" $(IN_TWO) $(TESTS)

# The tests take a fifth longer so.
coverage: $(VENV)/.installed-test  ## Run the tests, and list the lines that none of them runs
	$(BIN)/python -m pytest -m "not slow" $(IN_TWO) --cov=keras_bptt \
		--cov-report=term-missing:skip-covered $(TESTS)

# A folder of tests, such as engine: make test-slow PART=engine
PART ?=
TESTS ?= $(addprefix tests/,$(PART))

# pytest ends with status 5 where it collects no test, which is no failure here.
test-slow: $(VENV)/.installed-test  ## Run the tests that take long (hours; PART=engine: a part)
	$(BIN)/python -m pytest -m slow $(IN_TWO) $(TESTS) || [ $$? -eq 5 ]

# Of the layer and its truncation the tests in which tf.function calls it, as `fit` does, and
# all of exports and `convert`: make test-oldest TESTS='$(CORE)'
CORE := $(addprefix tests/layers/test_,bptt.py contract.py saving.py convert.py) \
	-k "graph or saving or convert"

test-oldest:  ## Run the tests with the oldest Python, TensorFlow and Keras of setup.cfg
	$(MAKE) test VENV=.venv-oldest PYTHON=$(PYTHON_OLDEST) CONSTRAINTS=tests/oldest.txt

# The newest are looked up each time, not only where setup.cfg changed.
test-newest:  ## Run the tests with a new Python and the newest TensorFlow and Keras
	rm -f .venv-newest/.installed-test
	$(MAKE) test VENV=.venv-newest PYTHON=$(PYTHON_NEWEST) \
		PIP_OPTIONS="--upgrade --upgrade-strategy eager"

doctest: $(VENV)/.installed-test  ## Run the examples in the docstrings
	$(BIN)/python -m pytest --doctest-modules keras_bptt || [ $$? -eq 5 ]

examples-smoke: $(VENV)/.installed-examples  ## Run every example in its short form
	@set -e; for example in $(filter-out %/basics.py %/common.py,$(wildcard examples/*.py)); do \
		output=$$(mktemp -d); \
		echo "$$example --smoke"; \
		$(BIN)/python $$example --smoke --output-dir "$$output"; \
		rm -r "$$output"; \
	done

# PyTorch and JAX take part where they are installed: .venv/bin/pip install --editable '.[peers]'
bench: $(VENV)/.installed-benchmarks  ## Measure speed and memory; overwrites docs/performance (an hour)
	$(BIN)/python benchmarks/report.py

accelerators: $(VENV)/.installed $(ACCELERATORS)/.installed  ## Compile for TPUs without one; overwrites docs/deploying
	$(BIN)/python benchmarks/accelerators/export.py build/accelerators
	$(ACCELERATORS)/bin/python benchmarks/accelerators/compile.py build/accelerators --write

accelerators-quick: $(VENV)/.installed $(ACCELERATORS)/.installed  ## Three of these programs, for one kind of TPU
	$(BIN)/python benchmarks/accelerators/export.py build/accelerators-quick --quick
	$(ACCELERATORS)/bin/python benchmarks/accelerators/compile.py build/accelerators-quick \
		--devices v5e

gpu-bundle: $(VENV)/.installed  ## Export what gpu.py races on a GPU, build/gpu.zip (minutes)
	$(BIN)/python benchmarks/accelerators/export_gpu.py build/gpu.zip

gpu-compile: gpu-bundle $(ACCELERATORS)/.installed-gpu  ## Compile these for an NVIDIA H100 without one (minutes)
	$(ACCELERATORS)/bin/python benchmarks/accelerators/compile_gpu.py build/gpu.zip

# PyTorch takes part where somebody installs it there.
gpu-quick: $(VENV)/.installed $(ACCELERATORS)/.installed  ## The same races on the CPU, of one small shape
	$(BIN)/python benchmarks/accelerators/export_gpu.py build/gpu-quick.zip --quick
	rm -f build/gpu-quick.json
	JAX_PLATFORMS=cpu $(ACCELERATORS)/bin/python benchmarks/accelerators/gpu.py \
		build/gpu-quick.zip --output build/gpu-quick.json
	$(BIN)/python benchmarks/accelerators/gpu_table.py build/gpu-quick.json

lint: $(VENV)/.installed-dev  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## Put style and formatting right; overwrites the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dist: $(VENV)/.installed-dev  ## Build the source distribution and the wheel
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

package: dist  ## Install the wheel in an empty environment, and train there
	rm -rf .venv-wheel
	$(BIN)/python -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet dist/*.whl
	.venv-wheel/bin/python tests/wheel.py dist/*.whl

# Of saved_models what make examples wrote and git does not keep; not what others put there.
clean:  ## Remove environments, caches and build/, trained models and all; says what
	@for each in $(wildcard $(VENV) .venv-* build dist *.egg-info .pytest_cache .ruff_cache \
			.mypy_cache .hypothesis .coverage); do \
		echo "Removing $$each"; rm -rf "$$each"; \
	done
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +; echo "Removing __pycache__"
	@! git rev-parse --git-dir >/dev/null 2>&1 || git clean -dfX -- \
		$(foreach kind,$(KINDS),$(addprefix saved_models/$(kind),/ .keras .npz))

# One stamp for each set of packages, older than setup.cfg only where that changed.
$(VENV)/.installed: setup.cfg pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing keras_bptt and its packages in $(VENV), the first time for minutes"
	@$(call install,.)
	@touch $@

$(VENV)/.installed-%: setup.cfg pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	@echo "Installing keras_bptt[$*] and its packages in $(VENV), the first time for minutes"
	@$(call install,.[$*])
	@touch $@

define install
$(BIN)/python -m pip install --quiet $(PIP_OPTIONS) $(addprefix --constraint ,$(CONSTRAINTS)) \
	--editable '$(1)' || { \
	echo "The installation failed. If pip found no matching tensorflow," \
		"choose a Python that TensorFlow supports:" \
		"make clean; make PYTHON=python3.12 demo" >&2; \
	exit 1; \
}
endef

$(ACCELERATORS)/.installed: benchmarks/accelerators/requirements.txt | $(BIN)/python
	@echo "Installing JAX and the compiler of TPUs in $(ACCELERATORS), 1.3 GB"
	@$(BIN)/python -m venv $(ACCELERATORS)
	@$(ACCELERATORS)/bin/python -m pip install --quiet --requirement $<
	@touch $@

$(ACCELERATORS)/.installed-gpu: benchmarks/accelerators/requirements_gpu.txt $(ACCELERATORS)/.installed
	@$(ACCELERATORS)/bin/python -m pip install --quiet --requirement $<
	@touch $@

# Removed if it cannot be finished, lest the next run take it for whole.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "keras_bptt needs Python 3.10 or newer. Received: PYTHON=$(PYTHON)," \
			"$$($(PYTHON) --version 2>/dev/null || echo which does not run)." \
			"Name another one: make PYTHON=python3.12 demo" >&2; \
		exit 1; \
	}
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
