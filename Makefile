# make demo: the main job. make test: everything, on all three backends. Both set up .venv first.
# make test-all: everything to every KerasHub backbone too, which `make test` does on one backend
# each. make test-oldest, make test-nightly: the suite with other versions of Keras and the rest.
# make docs: the site of docs/, into site/.
# make benchmarks-quick: each benchmark on tiny settings, as in the suite; its own results stay.
PYTHON ?= python3
BACKEND ?= tensorflow
VENV = .venv
BIN = $(VENV)/bin
PYTEST_ARGS =
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: setup demo lint docs package clean
.PHONY: test test-all test-oldest test-nightly suite suite-tensorflow suite-jax suite-torch
.PHONY: benchmarks-quick

setup: $(VENV)/ready

define install
$(PYTHON) -m venv $(@D)
$(@D)/bin/pip install --quiet --constraint $(1) torch
$(@D)/bin/pip install --quiet --constraint $(1) --editable ".[dev,tensorflow,jax,torch]"
endef

.venv/ready: pyproject.toml constraints.txt
	$(call install,constraints.txt)
	touch $@

.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(call install,constraints-oldest.txt)
	touch $@

# The nightlies share their folders with the releases.
.venv-nightly/ready: pyproject.toml constraints.txt constraints-nightly.txt
	$(call install,constraints.txt)
	$(@D)/bin/pip uninstall --quiet --yes keras keras-hub
	$(@D)/bin/pip install --quiet --force-reinstall --no-deps --requirement constraints-nightly.txt
	touch $@

demo: setup
	KERAS_BACKEND=$(BACKEND) $(BIN)/python examples/finetune_text_classifier.py \
		--sequence-length 32 --batch-size 16 --kernel-size 4

test: setup lint suite

test-all: setup lint
	$(MAKE) suite PYTEST_ARGS=--all-walks

test-oldest test-nightly: test-%:
	$(MAKE) suite VENV=.venv-$*

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@# A program of node's, which its package fetches on the first run.
	@if $(BIN)/pyright --version > /dev/null 2>&1; then $(BIN)/pyright; \
		else echo "Pyright is left out: it cannot be fetched here."; fi

# The site. Material's word on another program is left out.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What is uploaded, built and checked in an environment of its own.
package: .venv-release/ready
	rm -rf dist
	.venv-release/bin/python -m build
	.venv-release/bin/twine check --strict dist/*

.venv-release/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet build twine
	touch $@

suite: suite-tensorflow suite-jax suite-torch

# One process a core is enough: what the tests compute is too small to be shared among threads.
suite-tensorflow suite-jax suite-torch: suite-%: setup
	KERAS_BACKEND=$* OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 \
		$(BIN)/python -m pytest \
		--numprocesses auto --maxprocesses 4 $(PYTEST_ARGS)

# Each program on one of the backends.
benchmarks-quick:
	$(MAKE) suite PYTEST_ARGS="tests/benchmarks_test.py --durations 0 --durations-min 1"

clean:
	rm -rf .venv .venv-oldest .venv-nightly .venv-release .pytest_cache .mypy_cache dist site finetuned
