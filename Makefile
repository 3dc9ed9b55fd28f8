# make demo   fuse, verify and report on a FastViT variant
# make test   lint, types and tests
# make zoo    fuse the models of nine packages, resumable (hours); make bench: ratios
# All make .venv on first use; PYTHON chooses the interpreter (3.10 or later).

PYTHON ?= python3
MODEL ?= fastvit_t8
BIN := .venv/bin
PIP := $(BIN)/python -m pip
APP := .venv/.installed-app
TEST := .venv/.installed-test

.PHONY: demo test lint zoo bench clean

demo: $(APP)
	@mkdir -p out
	$(BIN)/fastvit fuse $(MODEL) -o out/$(MODEL).onnx -o out/$(MODEL).safetensors \
	    --report out/$(MODEL).json

test: lint
	$(BIN)/python -m pytest -n 2

zoo: $(TEST)
	$(PIP) install -e '.[zoo]'
	$(BIN)/python tests/zoo/survey.py run
	$(BIN)/python tests/zoo/survey.py report

bench: $(TEST)
	$(BIN)/python benchmarks/latency.py
	$(BIN)/python benchmarks/recommended.py
	$(BIN)/python benchmarks/fuse_cost.py
	$(BIN)/python benchmarks/op_counts.py

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch and torchvision come first and alone, so that one choice of their build (CPU,
# CUDA, a local wheel) holds for everything that depends on them.
$(APP): pyproject.toml | $(BIN)/python
	$(PIP) install torch torchvision
	$(PIP) install -e .
	@touch $@

$(TEST): pyproject.toml $(APP)
	$(PIP) install -e '.[test]'
	@touch $@

clean:
	rm -rf .venv build dist out *.egg-info
