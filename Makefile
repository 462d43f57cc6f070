# make demo: the main job. make test: everything, on all three backends. Both set up .venv first.
PYTHON ?= python3
BACKEND ?= tensorflow
BIN = .venv/bin
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: setup demo test test-tensorflow test-jax test-torch lint clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,tensorflow,jax,torch]"
	touch .venv/ready

demo: setup
	KERAS_BACKEND=$(BACKEND) $(BIN)/python examples/finetune_text_classifier.py --train-size 1400

test: setup lint test-tensorflow test-jax test-torch

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test-tensorflow test-jax test-torch: test-%: setup
	KERAS_BACKEND=$* $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

clean:
	rm -rf .venv finetuned
